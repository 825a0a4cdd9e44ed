"""lars_tree.torch.Lars in Lightning: resumed runs, and the same loops by hand, have equal bits."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
from conftest import need

from lars_tree import report

torch = need("torch")
lightning = need("lightning")

from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning  # noqa: E402
from lightning.pytorch.plugins.precision import MixedPrecision  # noqa: E402
from runs import (  # noqa: E402
    COEFFICIENT,
    DECAY,
    assert_same,
    loader,
    loss_of,
    network,
    optimizer,
    result,
    schedule,
)

from lars_tree.torch import Lars, param_groups  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning advises on workers and folders


class Module(lightning.LightningModule):
    """The network, with any options of the optimizer. `ratios` has those of each step."""

    def __init__(self, **options):
        super().__init__()
        self.net, self.options, self.ratios = network(), options, []

    @property
    def backbone(self):
        return self.net.backbone

    def training_step(self, batch, index):
        return loss_of(self.net, *batch)

    def on_before_optimizer_step(self, opt):
        self.ratios.append(opt.trust_ratios())

    def configure_optimizers(self):
        opt = optimizer(self.net, **self.options)
        return [opt], [schedule(opt)]


def fit(folder, module, epochs=4, resume=None, **options):
    trainer = lightning.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        max_epochs=epochs,
        **options,
    )
    trainer.fit(module, loader(), ckpt_path=resume)
    return trainer


def resumed(folder, make, stop=2, **options):
    """The trainer of a run that stops after some epochs and goes on with new objects."""
    path = folder / "stopped.ckpt"
    settings = {name: x() if callable(x) else x for name, x in options.items()}
    fit(folder, make(), stop, **settings).save_checkpoint(path)
    settings = {name: x() if callable(x) else x for name, x in options.items()}
    return fit(folder, make(), resume=path, **settings)


def of(trainer):
    return result(trainer.lightning_module.net, trainer.optimizers[0])


def by_hand(options, precision="32", clip=None, accumulate=1):
    net = network()
    opt = optimizer(net, **options)
    scheduler = schedule(opt)
    is_mixed = precision == "bf16-mixed"
    for _ in range(4):
        for i, batch in enumerate(loader(), 1):
            with torch.autocast("cpu", torch.bfloat16) if is_mixed else nullcontext():
                loss = loss_of(net, *batch)
            (loss / accumulate).backward()
            if i % accumulate == 0:
                if clip is not None:
                    params = [p for group in opt.param_groups for p in group["params"]]
                    torch.nn.utils.clip_grad_norm_(params, clip)
                opt.step()
                opt.zero_grad()
        scheduler.step()
    return result(net, opt)


@pytest.mark.parametrize(
    ("options", "precision", "clip", "accumulate"),
    [
        ({}, "32", None, 1),
        ({}, "bf16-mixed", 0.1, 1),
        ({}, "32", None, 2),
        ({"foreach": True}, "bf16-mixed", 0.1, 1),
        ({"fused": True}, "bf16-mixed", None, 1),
        ({"fused": True}, "32", 0.1, 1),
    ],
)
def test_a_run_and_its_resumption_have_the_bits_of_a_loop(
    tmp_path, options, precision, clip, accumulate
):
    expected = by_hand(options, precision, clip, accumulate)
    settings = {
        "precision": precision,
        "gradient_clip_val": clip,
        "accumulate_grad_batches": accumulate,
    }
    assert_same(of(fit(tmp_path, Module(**options), **settings)), expected)
    assert_same(of(resumed(tmp_path, lambda: Module(**options), **settings)), expected)


def test_ratios_are_read_in_a_hook_by_name(tmp_path):
    module = Module()
    fit(tmp_path, module, 1)
    names = [name for name, _ in module.net.named_parameters()]
    assert sorted(module.ratios[0]) == sorted(names)
    not_adapted = {name for name, x in module.ratios[0].items() if x == 1}
    assert not_adapted == set(names) - {"backbone.0.weight", "head.weight"}


class Manual(Module):
    """Manual optimization, where `self.optimizers()` is a wrapper."""

    automatic_optimization = False

    def training_step(self, batch, index):
        opt = self.optimizers()
        opt.zero_grad()
        self.manual_backward(loss_of(self.net, *batch))
        self.ratios.append((opt.trust_ratios(), report.trust_ratios(opt)))
        opt.step()
        if self.trainer.is_last_batch:
            self.lr_schedulers().step()

    def on_before_optimizer_step(self, opt):
        pass


def test_manual_optimization(tmp_path):
    module = Manual()
    expected = by_hand({})
    assert_same(of(fit(tmp_path, module)), expected)
    assert all(one == other for one, other in module.ratios)
    assert_same(of(resumed(tmp_path, Manual)), expected)


# ---- Skipped steps


class Overflowing(Module):
    """The second batch has an infinite loss."""

    def training_step(self, batch, index):
        return loss_of(self.net, *batch) * (float("inf") if index == 1 else 1.0)

    def on_before_optimizer_step(self, opt):
        pass


def scaling():
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=3)
    return MixedPrecision("16-mixed", "cpu", scaler)


@pytest.mark.parametrize("fused", [None, True])
def test_a_scaler_skips_steps_and_a_resumed_run_too(tmp_path, fused):
    expected = fit(tmp_path, Overflowing(fused=fused), plugins=[scaling()])
    again = resumed(tmp_path, lambda: Overflowing(fused=fused), plugins=lambda: [scaling()])
    assert all(torch.isfinite(x).all() for x in of(expected)["w"].values())
    assert_same(of(again), of(expected))
    scales = [x.strategy.precision_plugin.scaler.get_scale() for x in (expected, again)]
    assert scales[0] == scales[1] != 64


def test_lightning_refuses_to_clip_where_the_step_unscales(tmp_path):
    """As for torch's fused optimizers; without fused=True, clipping works."""
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        fit(tmp_path, Module(fused=True), plugins=[scaling()], gradient_clip_val=0.1)
    fit(tmp_path, Module(), plugins=[scaling()], gradient_clip_val=0.1)


def test_skipped_steps_are_not_in_a_checkpoint(tmp_path):
    """`nonfinite="skip"` without a scaler: weights go on, the count starts again."""
    expected = of(fit(tmp_path, Overflowing(nonfinite="skip")))
    again = of(resumed(tmp_path, lambda: Overflowing(nonfinite="skip")))
    assert (expected["skipped"], again["skipped"]) == (4, 2)
    assert_same({**again, "skipped": 4}, expected)


# ---- Parameters that are added in mid-run


class Head(Module):
    """Only the parameters that need gradients when training starts, without names."""

    def configure_optimizers(self):
        params = [p for p in self.net.parameters() if p.requires_grad]
        return Lars(params, lr=1.0, trust_coefficient=COEFFICIENT)


class Backbone(BackboneFinetuning):
    """Lightning leaves the backbone frozen when it resumes after the epoch of unfreezing."""

    def __init__(self):
        super().__init__(unfreeze_backbone_at_epoch=2, backbone_initial_lr=0.1)

    def finetune_function(self, module, epoch, opt):
        super().finetune_function(module, epoch, opt)
        if epoch > self.unfreeze_backbone_at_epoch:
            self.make_trainable(module.backbone)


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_backbone_finetuning(tmp_path, stop):
    expected = fit(tmp_path, Head(), callbacks=[Backbone()])
    again = resumed(tmp_path, Head, stop, callbacks=lambda: [Backbone()])
    assert_same(of(again), of(expected))
    assert len(again.optimizers[0].param_groups) == 2
    assert len(of(again)["v"]) == 6

    net = network()
    frozen = [*net.backbone[0].parameters()]
    for p in frozen:
        p.requires_grad_(False)
    rest = [p for p in net.parameters() if p.requires_grad]
    opt = Lars(rest, lr=1.0, trust_coefficient=COEFFICIENT)
    for epoch in range(4):
        if epoch == 2:
            for p in frozen:
                p.requires_grad_(True)
            opt.add_param_group({"params": frozen, "lr": 0.1})
        if epoch == 3:
            opt.param_groups[1]["lr"] *= 2
        for batch in loader():
            opt.zero_grad()
            loss_of(net, *batch).backward()
            opt.step()
    assert_same(of(again), result(net, opt))


class Groups(BaseFinetuning):
    """The callback of docs/recipes.md: the backbone gets groups with and without adaptation."""

    def freeze_before_training(self, module):
        self.freeze(module.backbone, train_bn=False)

    def finetune_function(self, module, epoch, opt):
        if epoch >= 2:
            self.make_trainable(module.backbone)
        if epoch == 2:
            for group in param_groups(module.backbone, named=True, weight_decay=DECAY, lr=0.25):
                opt.add_param_group(group)


class Unscheduled(Module):
    def configure_optimizers(self):
        return optimizer(self.net, **self.options)


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_groups_can_be_added_in_mid_run(tmp_path, stop):
    expected = fit(tmp_path, Unscheduled(), callbacks=[Groups()])
    again = resumed(tmp_path, Unscheduled, stop, callbacks=lambda: [Groups()])
    assert_same(of(again), of(expected))
    groups = again.optimizers[0].param_groups
    described = [(group["param_names"], group["adapt"], group["lr"]) for group in groups]
    assert described == [
        (["head.weight"], True, 1.0),
        (["head.bias"], False, 1.0),
        (["0.weight"], True, 0.25),
        (["0.bias", "1.weight", "1.bias"], False, 0.25),
    ]
