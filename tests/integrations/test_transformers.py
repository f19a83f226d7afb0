"""TunerMixin in Transformers' Trainer: checkpoints, its log, models of its own, and what it leaves behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hypergrad
from tests.integrations import runs
from tests.integrations.runs import STEPS, Job

transformers = pytest.importorskip("transformers")
HALF = STEPS // 2


@pytest.mark.slow
@pytest.mark.parametrize("scheduled", [True, False])
def test_resumes_bit_for_bit_from_a_checkpoint(tmp_path: Path, scheduled: bool) -> None:
    whole = runs.transformers(Job(scheduled=scheduled), tmp_path, save_strategy="epoch")
    first = tmp_path / f"checkpoint-{HALF}"
    assert (first / "tuner.pt").exists()
    again = runs.transformers(Job(scheduled=scheduled), tmp_path / "again", resume=first)
    assert len(again.used) == HALF and again.used == whole.used[HALF:]
    assert all(torch.equal(a, b) for a, b in zip(whole.weights, again.weights, strict=True))
    assert whole.tuner.stats == again.tuner.stats


@pytest.mark.slow
def test_a_checkpoint_of_a_run_without_a_tuner_is_gone_on_with(tmp_path: Path) -> None:
    runs.transformers(Job(), tmp_path, save_strategy="epoch")
    (tmp_path / f"checkpoint-{HALF}/tuner.pt").unlink()
    again = runs.transformers(Job(), tmp_path, resume=tmp_path / f"checkpoint-{HALF}")
    assert again.tuner.stats["steps"] == again.tuner._loop.total == HALF


def test_its_log_shows_the_lr_that_was_used(tmp_path: Path) -> None:
    found = runs.transformers(Job(), tmp_path, logging_strategy="steps", logging_steps=1)
    rows = [row for row in found.framework.state.log_history if "learning_rate" in row]
    assert [row["learning_rate"] for row in rows] == found.used and len(rows) == STEPS
    assert rows[-1]["weight_decay"] == float(found.tuner.values["weight_decay"][0])


def left_behind(job: Job) -> None:
    trainer = job.framework
    opt: Any = trainer.optimizer.optimizer
    assert "backward" not in vars(trainer.accelerator)
    assert len(opt._optimizer_step_pre_hooks) == 0 and len(opt._optimizer_step_post_hooks) == 1  # the test's own
    assert trainer.tuner._closed


def test_nothing_is_left_after_train(tmp_path: Path) -> None:
    left_behind(runs.transformers(Job(), tmp_path))


def test_nothing_is_left_after_an_exception(tmp_path: Path) -> None:
    job = Job(stop=7)
    with pytest.raises(ZeroDivisionError):
        runs.transformers(job, tmp_path)
    left_behind(job)
    assert job.tuner.stats["steps"] == 4


@pytest.mark.slow
def test_train_is_called_again(tmp_path: Path) -> None:
    job = runs.transformers(Job(), tmp_path)
    first = job.tuner
    job.framework.train()
    assert job.framework.tuner is not first and job.framework.tuner.stats["steps"] == STEPS
    left_behind(job)


def language_model(attention: str = "eager") -> Any:
    """A GPT of random weights, over 17 tokens."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=17,
        n_positions=12,
        n_embd=16,
        n_layer=1,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation=attention,
    )
    return transformers.GPT2LMHeadModel(config)


def texts() -> list[dict[str, torch.Tensor]]:
    """Sequences whose labels are masked at ends of random lengths, so that batches hold different numbers of tokens."""
    g = torch.Generator().manual_seed(1)
    rows = []
    for _ in range(96):
        ids = torch.randint(17, (), generator=g) + torch.arange(12) * torch.randint(1, 4, (), generator=g)
        ids = ids % 17
        labels = ids.clone()
        labels[int(torch.randint(4, 12, (), generator=g)) :] = -100
        labels[0] = -100  # it has nothing before it: versions differ in whether they count it
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def val_loss(model: Any) -> torch.Tensor:
    rows = texts()[80:]
    return model(**{name: torch.stack([row[name] for row in rows]) for name in rows[0]}).loss


def trainer(model: Any, folder: Path, tuned: Any = None, **arguments: Any) -> Any:
    """tuned: arguments of TunerMixin."""
    from hypergrad.integrations.transformers import TunerMixin

    class Tuned(TunerMixin, transformers.Trainer):
        def get_train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(self.train_dataset, batch_size=4, collate_fn=stacked)

    options = {
        "output_dir": str(folder),
        "num_train_epochs": 2,
        "learning_rate": 1e-4,
        "weight_decay": 0.01,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        **arguments,
    }
    mine = {"val_loss": val_loss, "tuner_options": {"every": 4}, **(tuned or {})}
    return Tuned(model, transformers.TrainingArguments(**options), train_dataset=texts()[:80], **mine)


def stacked(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


@pytest.mark.slow
def test_accumulated_tokens_are_divided_as_the_trainer_divides_them(tmp_path: Path) -> None:
    """A model of its own, its AdamW, its param groups and its linear scheduler: the same as a plain loop over the same tokens."""
    own = trainer(language_model(), tmp_path, gradient_accumulation_steps=2)
    own.train()

    model = language_model()
    decayed = [p for p in model.parameters() if p.dim() > 1]  # the trainer leaves biases and LayerNorm out
    rest = [p for p in model.parameters() if p.dim() == 1]
    opt = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}], lr=1e-4, fused=True
    )
    scheduler = transformers.get_linear_schedule_with_warmup(opt, 0, 20)
    tuner = hypergrad.Tuner(model, opt, lambda: val_loss(model), every=4, total_steps=20, clip_norm=1.0)
    for _ in range(2):
        for first in range(0, 80, 8):
            batches = [stacked(texts()[i : i + 4]) for i in (first, first + 4)]
            tokens = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)
            for batch in batches:
                tuner.backward(model(**batch, num_items_in_batch=tokens).loss)  # their sum over tokens
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
            scheduler.step()
            opt.zero_grad()
    assert own.tuner.stats["changed_gradients"] == own.tuner.stats["plain_steps"] == 0
    assert own.tuner.stats == tuner.stats and float(tuner.values["lr"].max()) > 5e-4
    # the Trainer's own gradients differ from a plain loop's by some 1e-9, tuned or not
    torch.testing.assert_close(own.tuner.values, tuner.values, rtol=1e-3, atol=0)
    torch.testing.assert_close(val_loss(own.model), val_loss(model), rtol=1e-3, atol=0)


@pytest.mark.slow
def test_fused_attention_is_computed_by_matrix_products_where_one_is_due(tmp_path: Path) -> None:
    own, eager = (trainer(language_model(kind), tmp_path / kind) for kind in ("sdpa", "eager"))
    for each in (own, eager):
        each.train()
    assert own.tuner.stats == eager.tuner.stats and own.tuner.stats["hessian_products"] > 0
    assert torch.allclose(own.tuner.values["lr"], eager.tuner.values["lr"], rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("plain_first", [False, True])
def test_biases_and_norms_are_not_decayed_where_decay_is_tuned_from_0(plain_first: bool, tmp_path: Path) -> None:
    """0 is the Trainer's default; a checkpoint of a run without a tuner has it in its optimizer."""
    own = trainer(language_model(), tmp_path, weight_decay=0.0, max_steps=20, save_strategy="steps", save_steps=10)
    if plain_first:
        own.train()
        (tmp_path / "checkpoint-10/tuner.pt").unlink()
        optimizer = torch.load(tmp_path / "checkpoint-10/optimizer.pt")
        for group in optimizer["param_groups"]:
            group["weight_decay"] = 0.0
        torch.save(optimizer, tmp_path / "checkpoint-10/optimizer.pt")
        own = trainer(language_model(), tmp_path, weight_decay=0.0, max_steps=20)
    own.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10") if plain_first else None)
    decayed, rest = own.tuner.values["weight_decay"].tolist()
    assert decayed > 0 and rest == 0 and [g["weight_decay"] for g in own.optimizer.param_groups] == [decayed, 0]


def test_a_tuner_that_is_refused_leaves_weight_decay_at_0(tmp_path: Path) -> None:
    own = trainer(language_model(), tmp_path, {"tuner_options": {"every": 0}}, weight_decay=0.0)
    with pytest.raises(ValueError, match="every"):
        own.train()
    assert [group["weight_decay"] for group in own.optimizer.param_groups] == [0, 0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of torch, while it compiles
def test_a_model_that_the_trainer_compiles_is_tuned(tmp_path: Path) -> None:
    found = []
    for compiled in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
        own = trainer(language_model(), tmp_path, max_steps=12, **compiled)
        own.train()
        found.append(own.tuner)
    assert found[0].stats == found[1].stats and found[0].stats["hessian_products"] > 0
    torch.testing.assert_close(found[0].values, found[1].values, rtol=1e-3, atol=0)


@pytest.mark.slow
def test_a_checkpoint_is_gone_on_with_for_more_steps(tmp_path: Path) -> None:
    """From the phase of weight decay back into that of lr."""
    trainer(language_model(), tmp_path, max_steps=20, save_strategy="steps", save_steps=17).train()
    own = trainer(language_model(), tmp_path, max_steps=60)
    with pytest.warns(UserWarning, match="a run with total_steps=20, this tuner has total_steps=60"):
        own.train(resume_from_checkpoint=str(tmp_path / "checkpoint-17"))
    assert own.tuner.stats["steps"] == own.tuner._loop.total == 60


def test_the_mixin_after_the_trainer_is_refused() -> None:
    from hypergrad.integrations.transformers import TunerMixin

    with pytest.raises(TypeError, match=r"^the mixin comes first: class Tuned\(TunerMixin, Trainer\)"):
        type("Tuned", (transformers.Trainer, TunerMixin), {})


def test_a_val_loss_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"^val_loss must be a function \(model\) -> scalar tensor, got NoneType"):
        trainer(language_model(), tmp_path, {"val_loss": None})
