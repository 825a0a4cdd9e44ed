"""lars_tree.torch.Lars with Accelerate: accumulation, mixed precision, skipped steps, resuming."""

from __future__ import annotations

import pytest
from conftest import need

from lars_tree import report

torch = need("torch")
accelerate = need("accelerate")

from accelerate.state import AcceleratorState  # noqa: E402
from runs import assert_same, loader, loss_of, network, optimizer, result, schedule  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # Accelerate warns about the CPU and folders


@pytest.fixture(autouse=True)
def one_accelerator():
    """Accelerate keeps the precision of the first accelerator for the whole process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def scaler():
    return torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=3)


def batches():
    return [*loader()] * 2


class Run:
    """A run of up to 8 micro-batches with an Accelerator. `skipped` has the skipped steps."""

    def __init__(self, precision, accumulate=1, clip=None, overflows=(), **options):
        AcceleratorState._reset_state(reset_partial_state=True)
        self.accelerator = accelerate.Accelerator(
            cpu=True, mixed_precision=precision, gradient_accumulation_steps=accumulate
        )
        if precision == "fp16":  # as Accelerate does on a device
            self.accelerator.native_amp, self.accelerator.scaler = True, scaler()
        net = network()
        opt = optimizer(net, **options)
        prepared = self.accelerator.prepare(net, opt, schedule(opt))
        self.net, self.opt, self.scheduler = prepared
        self.clip, self.overflows, self.skipped = clip, overflows, []

    def train(self, first, last):
        for i in range(first, last):
            x, y = batches()[i]
            with self.accelerator.accumulate(self.net):
                loss = loss_of(self.net, x, y)
                self.accelerator.backward(loss * (float("inf") if i in self.overflows else 1.0))
                if self.accelerator.sync_gradients and self.clip is not None:
                    self.accelerator.clip_grad_norm_(self.net.parameters(), self.clip)
                self.opt.step()
                if self.accelerator.sync_gradients and self.opt.step_was_skipped:
                    self.skipped.append(i)
                self.scheduler.step()
                self.opt.zero_grad()
        return self

    @property
    def result(self):
        return result(self.accelerator.unwrap_model(self.net), self.opt.optimizer)


def by_hand(precision, accumulate=1, clip=None, overflows=(), **options):
    net = network()
    opt = optimizer(net, **options)
    scheduler = schedule(opt)
    scale = torch.amp.GradScaler("cpu", enabled=False) if precision != "fp16" else scaler()
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    skips = []
    for i, batch in enumerate(batches()):
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            loss = loss_of(net, *batch)
        loss = loss * (float("inf") if i in overflows else 1.0)
        scale.scale(loss / accumulate).backward()
        if (i + 1) % accumulate:
            continue
        if clip is not None:
            scale.unscale_(opt)
            torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
        before = scale.get_scale()
        scale.step(opt)
        scale.update()
        skips.append(scale.get_scale() < before and not options.get("fused"))
        if not skips[-1]:
            scheduler.step()
        opt.zero_grad()
    return result(net, opt)


@pytest.mark.parametrize(
    ("precision", "options"),
    [
        ("no", {}),
        ("no", {"accumulate": 2, "foreach": True}),
        ("bf16", {"accumulate": 2, "clip": 0.5}),
        ("fp16", {}),
        ("fp16", {"accumulate": 2, "clip": 0.5}),
        ("fp16", {"overflows": (1, 2)}),
        ("fp16", {"overflows": (1, 2), "fused": True}),
        ("fp16", {"overflows": (5, 6), "accumulate": 2, "clip": 0.5, "nonfinite": "raise"}),
    ],
    ids=str,
)
def test_a_run_and_its_resumption_have_the_bits_of_a_loop(tmp_path, precision, options):
    expected = by_hand(precision, **options)
    whole = Run(precision, **options).train(0, 8)
    assert_same(whole.result, expected)
    first = Run(precision, **options).train(0, 4)
    first.accelerator.save_state(tmp_path)
    second = Run(precision, **options)
    second.accelerator.load_state(tmp_path)
    second.train(4, 8)
    assert_same(second.result, expected)
    # Accelerate sees skipped steps of an optimizer that does not unscale gradients itself.
    at = options.get("accumulate", 1)
    overflowing = sorted({i // at * at + at - 1 for i in options.get("overflows", ())})
    assert whole.skipped == first.skipped + second.skipped
    assert whole.skipped == ([] if options.get("fused") else overflowing)


@pytest.mark.parametrize("precision", ["no", "fp16"])
def test_reports_read_the_wrapped_optimizer(precision):
    run = Run(precision)
    x, y = batches()[0]
    run.accelerator.backward(loss_of(run.net, x, y))
    scale = 1.0 if precision == "no" else run.accelerator.scaler.get_scale()
    ratios = report.trust_ratios(run.opt, grad_scale=scale)
    assert ratios == run.opt.optimizer.trust_ratios(grad_scale=scale)
    assert ratios["head.bias"] == 1
    table = report.layer_table(run.opt, grad_scale=scale)
    assert [row["path"] for row in table] == list(ratios)
    run.accelerator.clip_grad_norm_(run.net.parameters(), 1e9)  # unscales the gradients
    again = report.trust_ratios(run.opt)
    assert again == ratios
