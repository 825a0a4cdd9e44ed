"""lars_tree.torch.Lars in Hugging Face's Trainer, for GPT-2, whose head shares the embedding."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from conftest import need

from lars_tree import report

torch = need("torch")
transformers = need("transformers")
need("accelerate")  # Trainer needs it

from runs import assert_same, result  # noqa: E402

from lars_tree.torch import Lars, param_groups  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # Trainer advises on tokens and folders

STEPS, RATE = 6, 0.5
OPTIONS = {"lr": RATE, "trust_coefficient": 0.02}


def gpt2():
    torch.manual_seed(0)
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    sizes = {"vocab_size": 17, "n_positions": 8, "n_embd": 8, "n_layer": 2, "n_head": 2}
    config = transformers.GPT2Config(**sizes, **dropout, bos_token_id=0, eos_token_id=0)
    return transformers.GPT2LMHeadModel(config)


def texts():
    tokens = torch.randint(0, 17, (32, 8), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": x, "labels": x} for x in tokens]


class Trainer(transformers.Trainer):
    """Trainer with batches in order and the mean loss, as in the loop by hand."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.model_accepts_loss_kwargs = False

    def _get_train_sampler(self, *args):
        return torch.utils.data.SequentialSampler(self.train_dataset)


class Ratios(transformers.TrainerCallback):
    """Reads the ratios before each step. Trainer gives callbacks the wrapped optimizer."""

    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **_):
        self.seen.append(report.trust_ratios(optimizer))


def groups(model, named=True):
    return param_groups(model, named=named, weight_decay=0.01)


def factor(step):
    return max(0.0, (STEPS - step) / STEPS)  # Trainer's default, without warm-up


def with_scheduler(model):
    opt = Lars(groups(model), **OPTIONS)
    return {"optimizers": (opt, torch.optim.lr_scheduler.LambdaLR(opt, factor))}


def with_trainers_scheduler(model):
    return {"optimizers": (Lars(groups(model, named=False), **OPTIONS), None)}


def by_class(model):
    """Trainer makes groups with and without decay."""
    return {"optimizer_cls_and_kwargs": (Lars, {**OPTIONS, "adapt": "decayed"})}


def by_class_with_groups(model):
    return {"optimizer_cls_and_kwargs": (Lars, {**OPTIONS, "params": groups(model)})}


def trainer(folder, way, callbacks=(), **options):
    model = gpt2()
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=STEPS,
        save_steps=3,
        weight_decay=0.01,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
        **options,
    )
    return Trainer(model, arguments, train_dataset=texts(), callbacks=[*callbacks], **way(model))


def of(run):
    return result(run.model, run.optimizer.optimizer)


def by_hand(accumulate, is_mixed):
    model = gpt2()
    opt = Lars(groups(model), **OPTIONS)
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, factor)
    data = torch.utils.data.DataLoader(texts(), batch_size=4)
    batches = [*data] * 2
    for i, batch in enumerate(batches[: STEPS * accumulate], 1):
        with torch.autocast("cpu", torch.bfloat16, enabled=is_mixed):
            loss = model(**batch).loss
        (loss / accumulate).backward()
        if i % accumulate == 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # Trainer's default
            opt.step()
            scheduler.step()
            opt.zero_grad()
    return result(model, opt)


@pytest.mark.parametrize(
    ("way", "accumulate", "bf16"),
    [
        (with_scheduler, 1, False),
        (with_scheduler, 2, True),
        (with_trainers_scheduler, 1, False),
        (by_class, 1, False),
        (by_class, 1, True),
        (by_class_with_groups, 2, False),
    ],
)
def test_a_run_and_its_resumption_have_the_bits_of_a_loop(tmp_path, way, accumulate, bf16):
    expected = by_hand(accumulate, bf16)
    settings = {"gradient_accumulation_steps": accumulate, "bf16": bf16}
    whole = trainer(tmp_path, way, **settings)
    whole.train()
    assert_same(of(whole), expected)
    again = trainer(tmp_path, way, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same(of(again), expected)
    assert "lm_head.weight" not in expected["v"]  # it is the embedding, which is updated once
    assert whole.model.lm_head.weight is whole.model.transformer.wte.weight


@pytest.mark.parametrize(("way", "names"), [(by_class, False), (by_class_with_groups, True)])
def test_a_callback_reads_the_ratios(tmp_path, way, names):
    ratios = Ratios()
    trainer(tmp_path, way, [ratios]).train()
    assert len(ratios.seen) == STEPS
    assert ("transformer.wte.weight" in ratios.seen[0]) is names
    assert sum(x == 1 for x in ratios.seen[0].values()) == 18  # biases and norm layers
    assert len(ratios.seen[0]) == 28


def test_frozen_parameters_are_left_out_and_left_alone(tmp_path):
    def frozen(model):
        model.transformer.h[0].requires_grad_(False)
        return by_class_with_groups(model)

    run = trainer(tmp_path, frozen)
    run.train()
    before = gpt2().state_dict()
    kept = {name for name, x in run.model.state_dict().items() if torch.equal(x, before[name])}
    assert kept == {name for name in before if name.startswith("transformer.h.0.")}
    assert not any(name.startswith("transformer.h.0.") for name in of(run)["v"])
