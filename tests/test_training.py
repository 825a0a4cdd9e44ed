"""`benchmarks.training` on a few images, mostly for one epoch."""

from __future__ import annotations

import pytest
from conftest import need

torch = need("torch")
need("sklearn")

from benchmarks import training  # noqa: E402
from benchmarks.training import CONTESTANTS, Plan, Results, Run  # noqa: E402

COUNT = 96
PLAN = Plan(epochs=1, batches=(32, COUNT), seeds=(0,), candidates=2, extra=0, further=(1, 2))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """More threads do not help layers of this size."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data():
    return training.Data(*((images[:COUNT], labels[:COUNT]) for images, labels in training.load()))


@pytest.fixture(scope="module")
def results(data, tmp_path_factory):
    log = training.Log(tmp_path_factory.mktemp("training") / "runs.json", {})
    return training.experiment(data, PLAN, log)


def run_with(test=0.5, validation=0.5):
    return Run(validation, test, 0, 0, 0.0)


def results_with(accuracies, further):
    """Results with accuracies in percent; those in `further` are from further seeds."""
    plan = Plan(batches=tuple(accuracies[next(iter(accuracies))]), further=(8, 9))
    cells = {
        (name, batch): {0: [run_with(x / 100) for x in values]}
        for name, by_batch in accuracies.items()
        for batch, values in by_batch.items()
    }
    return Results(plan, cells, {k: [run_with(x / 100) for x in v] for k, v in further.items()})


def test_the_parts_are_disjoint_and_contain_all_digits():
    data = training.load()
    assert [len(labels) for _, labels in data] == [1024, 373, 400]
    parts = [{image.numpy().tobytes() for image in images} for images, _ in data]
    assert len(parts[0] | parts[1] | parts[2]) == 1797  # no two digits have the same pixels
    assert all(labels.unique().tolist() == list(range(10)) for _, labels in data)


def test_equal_epochs_are_equal_images_for_every_batch_size(data):
    for batch, steps in {32: 6, 40: 6, COUNT: 2, 10 * COUNT: 2}.items():
        got = training.train(data, "SGD", 0.1, batch=batch, seed=0, epochs=2)
        assert (got.images, got.steps) == (2 * COUNT, steps)


@pytest.mark.parametrize("name", CONTESTANTS)
def test_runs_are_reproducible_and_depend_on_the_seed(data, name):
    def weights(seed):
        rate = training.rate_of(CONTESTANTS[name].centre)
        model = training.fit(data.train, name, rate, batch=32, seed=seed, epochs=1)[0]
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    before = torch.get_rng_state()
    first = weights(0)
    assert torch.equal(first, weights(0))
    assert not torch.equal(first, weights(1))
    assert torch.equal(torch.get_rng_state(), before)


def test_all_optimizers_start_from_the_same_weights(data):
    def weights(name, rate):
        model = training.fit(data.train, name, rate, batch=32, seed=0, epochs=1)[0]
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    start = weights("SGD", 0.0)
    for name in CONTESTANTS:
        assert torch.equal(weights(name, 0.0), start)
        assert not torch.equal(weights(name, 0.01), start)


def test_trust_1_takes_the_same_steps_at_a_thousandth_of_the_rate(data):
    def first_kernel(name, rate):  # at batch 48 only the second step changes the weights
        return training.fit(data.train, name, rate, batch=48, seed=0, epochs=1)[0][0].weight

    one, recipe = first_kernel("LARS, trust 1", 0.1), first_kernel("LARS, trust 0.001", 100.0)
    torch.testing.assert_close(one, recipe)
    assert not torch.allclose(one, first_kernel("LARS, trust 1", 0.2))


def test_it_trains():
    got = training.train(training.load(), "LARS, trust 1", 0.1, batch=32, seed=0, epochs=2)
    assert got.validation > 0.85
    assert got.test > 0.85


def test_settle_computes_the_batch_norm_statistics_of_the_images(data):
    model, *_ = training.fit(data.train, "SGD", 0.1, batch=32, seed=0, epochs=1)
    training.settle(model, data.train[0])
    with torch.no_grad():
        inputs = model[0](data.train[0])
    torch.testing.assert_close(model[1].running_mean, inputs.mean(dim=(0, 2, 3)))
    torch.testing.assert_close(model[1].running_var, inputs.var(dim=(0, 2, 3)))
    assert not model.training


def test_rates_are_1_and_3_times_powers_of_ten():
    assert [training.rate_of(x) for x in range(-4, 4)] == [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30]


def test_the_rate_is_chosen_by_mean_validation_accuracy():
    runs = {
        0: [run_with(0.99, validation=0.5), run_with(0.99, validation=0.9)],
        1: [run_with(0.10, validation=0.7), run_with(0.20, validation=0.8)],
        2: [run_with(0.99, validation=0.6), run_with(0.99, validation=0.8)],
    }
    assert training.choose(runs) == 1
    assert training.scores(runs) == [10, 20]
    assert training.choose({2: [run_with()], 1: [run_with()]}) == 1  # a tie: the smaller rate


@pytest.mark.parametrize("peak", [-4, 0, 5])
def test_rates_are_added_while_the_best_is_at_the_edge(peak):
    plan = Plan(seeds=(0, 1), candidates=5, extra=4)
    calls = []

    def trained(exponent, seed):
        calls.append((exponent, seed))
        return run_with(validation=-abs(exponent - peak))

    runs = training.tune(trained, 0, plan)
    assert training.choose(runs) == peak
    assert not training.at_edge(runs)
    exponents = range(min(-2, peak - 1), max(2, peak + 1) + 1)
    assert sorted(runs) == list(exponents)
    assert sorted(calls) == [(x, seed) for x in exponents for seed in (0, 1)]  # no run twice
    far_off = training.tune(trained, peak - 9, plan)
    assert training.at_edge(far_off)
    assert len(far_off) == plan.candidates + plan.extra


def test_the_table_has_every_cell(results):
    head, *rows = training.table(results)
    assert head == ["", "batch 32", "batch 96", "96, further seeds"]
    assert [row[0] for row in rows] == list(CONTESTANTS)
    for name, *cells, further in rows:
        for batch, cell in zip(PLAN.batches, cells, strict=True):
            runs = results.cells[name, batch]
            assert len(runs) == PLAN.candidates
            [found] = training.scores(runs)
            assert cell == f"{found:.2f} ± 0.00 ({training.rate_of(training.choose(runs)):g})"
        a, b = (100 * x.test for x in results.further[name])
        assert further == f"{(a + b) / 2:.2f} ± {abs(a - b) / 2**0.5:.2f}"


def test_the_table_shows_half_the_range():
    results = results_with(
        {name: {32: [90, 92, 97]} for name in CONTESTANTS}, {name: [90, 92] for name in CONTESTANTS}
    )
    assert training.table(results)[1][1:] == ["93.00 ± 3.50 (1)", "91.00 ± 1.41"]


def test_the_findings_follow_from_the_numbers():
    kept, lost, worse = {32: [98], 96: [97]}, {32: [98], 96: [96.5]}, {32: [98], 96: [90]}
    first, second, *_ = CONTESTANTS
    accuracies = {first: kept, second: lost, "SGD": worse, "Adam": kept}
    further = {first: [96, 98], second: [89, 92], "SGD": [89, 91], "Adam": [20, 30]}
    lines = training.findings(results_with(accuracies, further))
    expected = "98.00% at batch 32, 97.00% at batch 96 (-1.00 points); kept up to batch 96."
    assert lines[0] == f"**{first}**: {expected}"
    assert "kept up to batch 32." in lines[1]
    assert "7.00 ± 2.83 points above SGD; 72.00 ± 10.20 points above Adam" in lines[4]
    assert lines[4].endswith("is confirmed.")
    assert "not distinguishable from SGD (0.50 ± 3.61 points)" in lines[5]
    assert lines[5].endswith(
        "not confirmed: its accuracy is kept only up to batch 32; it is not above SGD."
    )
    accuracies["SGD"] = kept
    lines = training.findings(results_with(accuracies, further))
    assert "not confirmed: SGD keeps its accuracy too." in lines[4]


def test_the_page_shows_the_tables(results):
    text = training.page(results, "the command")
    assert "$" not in text
    for row in training.table(results):
        assert f"| {' | '.join(row)} |" in text
    assert "the command" in text
    assert f"{len(CONTESTANTS) * (2 * 2 + 2)} runs" in text


def test_finished_runs_are_read_from_the_log(tmp_path):
    path = tmp_path / "runs.json"
    training.Log(path, {"a": (1,)}).run("one", lambda: run_with(0.25))
    log = training.Log(path, {"a": (1,)})
    assert log.run("one", lambda: pytest.fail("run again")) == run_with(0.25)
    assert log.run("two", lambda: run_with(0.75)) == run_with(0.75)
    with pytest.raises(ValueError, match="made with"):
        training.Log(path, {"a": (2,)})


def test_the_plot_has_a_line_for_each_optimizer(results, tmp_path):
    need("matplotlib")
    training.plot(results, tmp_path / "plot.svg")
    text = (tmp_path / "plot.svg").read_text()
    assert len(text) < 200_000
    assert all(f">{name}</text>" in text for name in [*CONTESTANTS, "test accuracy, %"])
    assert all(x.color in text for x in CONTESTANTS.values())
