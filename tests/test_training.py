"""`benchmarks.training` on a few images, mostly for one epoch."""

from __future__ import annotations

import pytest
from conftest import need

torch = need("torch")
need("mlxtend")

from benchmarks import training, training_page  # noqa: E402
from benchmarks.training import CONTESTANTS, Cell, Plan, Results, Run  # noqa: E402

COUNT = 96
PLAN = Plan(
    *(1, (32, COUNT), (COUNT,), (0,)),
    candidates=2,
    extra=0,
    refined=(),
    seeds=(1, 2),
    further=(3,),
)


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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "load", lambda: data)
        return training.experiment(PLAN, tmp_path_factory.mktemp("training") / "runs.jsonl")


def weights(data, name, rate, seed=0, batch=32, norm=False, **options):
    cell = Cell(name, norm, batch)
    model = training.fit(data.train, cell, rate, seed, epochs=1, **options)[0]
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def run_with(test=0.5, validation=0.5):
    return Run(validation, test, 0, 0, 0.0)


def results_with(accuracies):
    """Results with these accuracies in percent for each optimizer and batch size, for all seeds."""
    plan = Plan(batches=tuple(accuracies["SGD"]), large=(96,))
    scored = {
        Cell(name, norm, batch): [run_with(x / 100) for x in values]
        for norm in (False, True)
        for name, by_batch in accuracies.items()
        for batch, values in by_batch.items()
    }
    tuned = {x: [run_with(validation=0.5 - 0.1 * abs(x))] for x in (-1, 0, 1)}
    tuning = dict.fromkeys(scored, tuned)
    by_factor = {
        Cell("LARS 0.001", norm, 32): {
            factor: [run_with(validation=x), run_with(validation=x + 0.1)]
            for factor, x in zip(training.FACTORS, row, strict=True)
        }
        for norm, row in {False: [0.3, 0.5, 0.7, 0.6, 0.5, 0.2], True: [0.6, *[0.5] * 5]}.items()
    }
    return Results(plan, tuning, scored, by_factor)


def test_the_parts_are_disjoint_and_contain_all_digits():
    data = training.load()
    assert [len(labels) for _, labels in data] == [4000, 500, 500]
    parts = [{image.numpy().tobytes() for image in images} for images, _ in data]
    assert len(parts[0] | parts[1] | parts[2]) == 5000  # no two digits have the same pixels
    assert all(labels.unique().tolist() == list(range(10)) for _, labels in data)
    assert all((images.min(), images.max()) == (0, 1) for images, _ in data)


@pytest.mark.parametrize("norm", [False, True])
def test_equal_epochs_are_equal_images_for_every_batch_size(data, norm):
    for batch, steps in {32: 6, 40: 6, COUNT: 2, 10 * COUNT: 2}.items():
        got = training.train(data, Cell("SGD", norm, batch), 0.1, seed=0, epochs=2)
        assert (got.images, got.steps) == (2 * COUNT, steps)


@pytest.mark.parametrize("name", CONTESTANTS)
def test_runs_are_reproducible_and_depend_on_the_seed(data, name):
    rate = training.rate_of(CONTESTANTS[name].centre)
    before = torch.get_rng_state()
    first = weights(data, name, rate)
    assert torch.equal(first, weights(data, name, rate))
    assert not torch.equal(first, weights(data, name, rate, seed=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_all_optimizers_start_from_the_same_weights(data):
    for norm in (False, True):
        start = weights(data, "SGD", 0.0, norm=norm)
        for name in CONTESTANTS:
            assert torch.equal(weights(data, name, 0.0, norm=norm), start)
            assert not torch.equal(weights(data, name, 0.01, norm=norm), start)


def test_a_batch_in_parts_has_the_gradient_of_the_batch(data, monkeypatch):
    whole = weights(data, "SGD", 0.1, batch=COUNT)
    monkeypatch.setattr(training, "PART", 40)
    torch.testing.assert_close(weights(data, "SGD", 0.1, batch=COUNT), whole)
    assert not torch.allclose(weights(data, "SGD", 0.1, batch=COUNT, norm=True), whole[0])


def test_trust_1_takes_the_steps_of_0_001_with_two_rates(data):
    one = weights(data, "LARS 1", 0.1)
    torch.testing.assert_close(weights(data, "LARS 0.001", 100.0, excluded_lr=0.1), one)
    assert not torch.allclose(weights(data, "LARS 0.001", 100.0), one)


def test_it_trains():
    got = training.train(training.load(), Cell("LARS 1", True, 64), 0.03, seed=0, epochs=1)
    assert got.validation > 0.8
    assert got.test > 0.8


def test_settle_computes_the_batch_norm_statistics_of_the_images(data):
    model, *_ = training.fit(data.train, Cell("SGD", True, 32), 0.1, seed=0, epochs=1)
    training.settle(model, data.train[0])
    with torch.no_grad():
        inputs = model[0](data.train[0])
    torch.testing.assert_close(model[1].running_mean, inputs.mean(dim=(0, 2, 3)))
    torch.testing.assert_close(model[1].running_var, inputs.var(dim=(0, 2, 3)))
    assert not model.training


def test_rates_are_quarters_of_powers_of_ten():
    rates = [training.rate_of(x) for x in range(-8, 6)]
    assert rates == [0.01, 0.018, 0.03, 0.055, 0.1, 0.18, 0.3, 0.55, 1, 1.8, 3, 5.5, 10, 18]


def test_the_rate_is_chosen_by_mean_validation_accuracy():
    runs = {
        0: [run_with(0.99, validation=0.5), run_with(0.99, validation=0.9)],
        1: [run_with(0.10, validation=0.7), run_with(0.20, validation=0.8)],
        2: [run_with(0.99, validation=0.6), run_with(0.99, validation=0.8)],
    }
    assert training.choose(runs) == 1
    assert training.choose({2: [run_with()], 1: [run_with()]}) == 1  # a tie: the smaller rate


@pytest.mark.parametrize("refine", [False, True])
@pytest.mark.parametrize("peak", [-4, 0, 5])
def test_rates_are_added_while_the_best_is_at_the_edge(peak, refine):
    plan = Plan(tuning=(0, 1), candidates=3, extra=4)
    calls = []

    def trained(position, seed):
        calls.append((position, seed))
        return run_with(validation=-abs(position - peak))

    runs = training.tune(trained, 0, plan, refine)
    coarse = min(range(-20, 20, 2), key=lambda x: abs(x - peak))  # a tie: the smaller rate
    assert training.choose(runs) == (peak if refine else coarse)
    assert not training.at_edge(runs)
    positions = {*range(min(-2, coarse - 2), max(2, coarse + 2) + 1, 2)}
    positions |= {coarse - 1, coarse + 1} if refine else set()
    assert set(runs) == positions
    assert sorted(calls) == sorted((x, seed) for x in positions for seed in (0, 1))  # none twice
    far_off = training.tune(trained, peak - 19, plan, refine=False)
    assert training.at_edge(far_off)
    assert len(far_off) == plan.candidates + plan.extra


def test_the_table_has_every_cell(results):
    for norm, title in training_page.NORMS.items():
        head, *rows = training_page.table(results, norm)
        assert head == [title, "batch 32", "batch 96"]
        assert [row[0] for row in rows] == list(CONTESTANTS)
        for name, *row in rows:
            everywhere = CONTESTANTS[name].at_all_batches
            for batch, seeds, cell in zip(PLAN.batches, (2, 3), row, strict=True):
                if batch == 32 and not everywhere:
                    assert cell == ""
                    continue
                tuning = results.tuning[Cell(name, norm, batch)]
                assert len(tuning) == PLAN.candidates
                found = [100 * x.test for x in results.scored[Cell(name, norm, batch)]]
                assert len(found) == seeds
                rate = training.rate_of(training.choose(tuning))
                assert cell.startswith(f"{sum(found) / seeds:.1f} ± ")
                assert cell.endswith(f" ({rate:g})")


def test_scores_are_of_other_seeds_than_the_choice_of_the_rate(data, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "load", lambda: data)
    lab = training.Lab(PLAN, tmp_path / "runs.jsonl")
    cell = Cell("SGD", False, COUNT)
    chosen = lab.tuned(cell)
    expected = [lab.run(cell, training.choose(chosen), seed) for seed in PLAN.seeds]
    assert lab.scored(cell, PLAN.seeds) == expected
    assert not set(PLAN.tuning) & {*PLAN.seeds, *PLAN.further}
    assert not set(Plan().tuning) & {*Plan().seeds, *Plan().further}


def test_the_findings_follow_from_the_numbers():
    kept, lost, worse = {32: [98, 98], 96: [97, 97]}, {32: [98, 98], 96: [97, 96]}, {32: [98, 98]}
    accuracies = dict.fromkeys(CONTESTANTS, kept)
    accuracies |= {"SGD": {**worse, 96: [88, 92]}, "Adam": lost}
    points, compared, verdict, *_ = training_page.findings(results_with(accuracies))
    assert points.startswith("Without batch norm, points lost from batch 32 to 96: LARS 1 1.0 (to")
    assert points.endswith("Adam 1.5 (to 96.5%), SGD 8.0 (to 90.0%).")
    assert "**LARS 1** is not distinguishable from LARS 0.001 (0.0 ± 0.0 points)" in compared
    assert "7.0 ± 4.0 points above SGD; not distinguishable from Adam (0.5 ± 1.0" in compared
    assert "keeps the accuracy of batch 32 up to 96, SGD up to 32." in verdict
    assert verdict.endswith("is confirmed.")
    accuracies["SGD"] = kept
    assert training_page.findings(results_with(accuracies))[2].endswith("is not confirmed.")
    accuracies["LARS 1"] = lost
    *_, verdict = training_page.findings(results_with(accuracies))
    assert "up to 32, SGD up to 96." in verdict
    assert verdict.endswith("is not confirmed.")


def test_cells_that_are_tuned_badly_are_named():
    results = results_with({name: {32: [98, 98]} for name in CONTESTANTS})
    assert training_page.tuned_badly(results, training.at_edge) == "none"
    assert training_page.tuned_badly(results, training_page.is_near_chance) == "none"
    results.tuning[Cell("SGD", True, 32)] = {0: [run_with()], 1: [run_with(validation=0.6)]}
    results.tuning[Cell("Adam", False, 32)] = {
        x: [run_with(validation=0.15 - 0.01 * abs(x))] for x in (-1, 0, 1)
    }
    edge = training_page.tuned_badly(results, training.at_edge)
    assert edge == "SGD with batch norm at batch 32"
    near = training_page.tuned_badly(results, training_page.is_near_chance)
    assert near == "Adam without batch norm at batch 32"


def test_the_finding_about_factors_follows_from_the_numbers():
    results = results_with({name: {32: [98, 98]} for name in CONTESTANTS})
    text = training_page.about_factors(results)
    assert "× 1: 40.0, × 0.1: 20.0, × 0.01: 10.0, × 0.001: 10.0, × 0.0001: 20.0, × 0: 50.0" in text
    assert training_page.by_factor(results)[1][:4] == [
        *("without batch norm, batch 32", "1000", "35.0", "55.0")
    ]


def test_the_page_shows_the_tables(results):
    text = training_page.page(results, "the command")
    assert "$" not in text
    tables = [training_page.table(results, norm) for norm in (False, True)]
    for rows in [*tables, training_page.by_rate(results), training_page.by_factor(results)]:
        assert all(f"| {' | '.join(row)} |" in text for row in rows)
    assert all(f"* {line}" in text for line in training_page.findings(results))
    assert "the command" in text
    rates, everywhere = PLAN.candidates, sum(x.at_all_batches for x in CONTESTANTS.values())
    count = len(CONTESTANTS) * (rates + 3) + everywhere * (rates + 2) + len(training.FACTORS)
    assert f"{2 * count} runs" in text


def test_finished_runs_are_read_from_the_log(tmp_path):
    path = tmp_path / "runs.jsonl"
    first = training.Log(path, {"a": (1,)})
    first.run("one", lambda: run_with(0.25))
    assert first.run("one", lambda: pytest.fail("run again")) == run_with(0.25)
    training.Log(path, {"a": (1,)}).run("two", lambda: run_with(0.5))  # as another process does
    with path.open("a") as file:
        file.write('["three", [0.5')  # as after a crash
    log = training.Log(path, {"a": (1,)})
    assert log.run("one", lambda: pytest.fail("run again")) == run_with(0.25)
    assert log.run("two", lambda: pytest.fail("run again")) == run_with(0.5)
    log.run("three", lambda: run_with(0.75))
    assert training.Log(path, {"a": (1,)}).run("three", lambda: pytest.fail("again")) == run_with(
        0.75
    )
    with pytest.raises(ValueError, match="made with"):
        training.Log(path, {"a": (2,)})


def test_several_processes_make_the_same_runs(tmp_path):
    plan = Plan(
        1,
        (500, 4000),
        (4000,),
        tuning=(0,),
        candidates=1,
        extra=0,
        refined=(),
        seeds=(1, 2),
        further=(),
    )
    path, cells = tmp_path / "runs.jsonl", [Cell("SGD", norm, 4000) for norm in (False, True)]
    training.in_processes(plan, path, [("scored", (cell, (1,))) for cell in cells], jobs=2)
    assert len(path.read_text().splitlines()) == 1 + 2 * 2
    lab = training.Lab(plan, path)
    for cell in cells:
        expected = training.train(training.load(), cell, 0.3, seed=1, epochs=1)
        assert [run[:4] for run in lab.scored(cell, (1,))] == [expected[:4]]
    assert len(path.read_text().splitlines()) == 1 + 2 * 2  # none was made again


def test_the_plot_has_a_line_for_each_optimizer(results, tmp_path):
    need("matplotlib")
    training_page.plot(results, tmp_path / "plot.svg")
    text = (tmp_path / "plot.svg").read_text()
    assert len(text) < 200_000
    assert all(f">{name}</text>" in text for name in [*CONTESTANTS, "test accuracy, %"])
    assert all(color in text for color, _ in training_page.STYLES.values())
    assert all(f">{title}</text>" in text for title in training_page.NORMS.values())
