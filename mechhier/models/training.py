"""Training by `transformers.Trainer`: exact to resume, a checkpoint grid, one small log.

What is exact: on one CPU, or with deterministic kernels, a training that was killed at any moment and called again
ends in bitwise the same weights as an uninterrupted one, with the same number of threads. Several processes
(`accelerate launch`, `torchrun`) share a batch, one device each.
"""

from __future__ import annotations

import json
import math
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from mechhier.files import write_whole
from mechhier.grammars import Corpus
from mechhier.models.quiet import quiet_transformers
from mechhier.models.run import (
    CHECKPOINTS,
    LOG,
    MANIFEST,
    Manifest,
    Run,
    RunError,
    checkpoint_folder,
    package_versions,
)
from mechhier.models.spec import ModelSpec, TrainSpec, checkpoint_steps
from mechhier.models.tokenizer import word_level_tokenizer
from mechhier.progress import track

TRAINER = "trainer"
_POINTER = "latest.json"
_LOG_LINES = 200
# Between checkpoints the trainer's state is saved every half minute, but never for more than 1/50 of the time.
_STATE_SECONDS = 30.0
_STATE_SHARE = 50.0


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step and what to do."""


def train(spec: ModelSpec, corpus: Corpus, out: str | Path, *, train: TrainSpec | None = None) -> Run:
    """Train a model on a corpus, or go on with a training that was interrupted, or return one that has finished.

    Batch n is rows n B to (n + 1) B of the corpus (modulo its length), the loss is the mean cross-entropy of the next
    token in nats. The first token of a row is never predicted. Precision: float32 weights; on CUDA devices that have
    it, bfloat16 autocast.

    Args:
        spec: Shape of the model.
        corpus: Text to train on; its validation split (its test split, if it is itself the validation split) measures
            `eval_loss`.
        out: Folder of the run; made if absent, and gone on with if it holds the same training.
        train: How to train; the defaults of `TrainSpec` if None.

    Returns:
        The finished run.

    Raises:
        RunError: `out` holds another training or something else; nothing is touched.
        TrainingError: The loss is not finite.
        ValueError: The corpus's rows are longer than the model's context, or it is shorter than one batch.

    Cost: `steps` forward and backward passes, and `eval_rows` forward rows at each checkpoint.
    """
    out, settings = Path(out), train or TrainSpec()
    manifest = _plan(spec, corpus, settings)
    existing = _check_folder(out, manifest)
    if existing is not None and existing.finished:
        return Run.open(out)
    main = PartialState().is_main_process
    if main:
        (out / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        if existing is None:
            manifest.write(out)
    with _callers_random_state(), quiet_transformers():
        _Session(manifest, corpus, out).run()
    if main:
        manifest.model_copy(update={"finished": True}).write(out)
        shutil.rmtree(out / TRAINER, ignore_errors=True)
    PartialState().wait_for_everyone()
    return Run.open(out)


def _plan(spec: ModelSpec, corpus: Corpus, train: TrainSpec) -> Manifest:
    """Everything that is decided before the first step; refuses what cannot work."""
    if spec.n_ctx is not None and spec.n_ctx < corpus.context:
        raise ValueError(f"the corpus's rows of {corpus.context} tokens do not fit the model's n_ctx={spec.n_ctx}")
    steps = train.steps or corpus.n_rows // train.batch_size
    if steps <= train.warmup_steps:
        raise ValueError(
            f"one pass over {corpus.n_rows} rows is {steps} steps of {train.batch_size} rows, which must be more than "
            f"warmup_steps={train.warmup_steps}: use a longer corpus, smaller batches, a shorter warm-up, or give steps"
        )
    n_processes = PartialState().num_processes
    if train.batch_size % n_processes:
        raise ValueError(f"batch_size={train.batch_size} must be divisible by the {n_processes} processes")
    device = PartialState().device or torch.device("cpu")
    precision = "bfloat16 autocast" if _uses_bf16() else "float32"
    return Manifest(
        model=spec,
        train=train,
        corpus=corpus.description,
        steps=steps,
        device=f"{n_processes} x {device.type}, {precision}",
        versions=package_versions(),
    )


def _uses_bf16() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported()


def _check_folder(out: Path, manifest: Manifest) -> Manifest | None:
    """The manifest of the same training if `out` holds one, None if it is free."""
    if out.exists() and not out.is_dir():
        raise RunError(f"{out} is a file; out must be a folder")
    if (out / MANIFEST).exists():
        existing = Manifest.read(out)
        if differences := existing.differences(manifest):
            raise RunError(
                f"{out} holds another training; choose another folder or remove it. It differs in (there -> here):\n  "
                + "\n  ".join(differences)
            )
        return existing
    # A kill before the manifest was renamed into place leaves only our own temporary file and an empty folder.
    ours = {f".{MANIFEST}.tmp", CHECKPOINTS}
    if out.is_dir() and any(path.name not in ours for path in out.iterdir()):
        raise RunError(f"{out} is not empty and not a run; choose another folder")
    return None


@contextmanager
def _callers_random_state() -> Iterator[None]:
    """Restore the global random states, which the Trainer seeds, as the caller left them."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_available() else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


class _Rows(Dataset):
    """The rows of all steps in order, read a batch at a time."""

    def __init__(self, corpus: Corpus, n_rows: int) -> None:
        self.corpus = corpus
        self.n_rows = n_rows

    def __len__(self) -> int:
        return self.n_rows

    def __getitems__(self, indices: Sequence[int]) -> torch.Tensor:
        """Rows of a batch of consecutive indices, [batch, position]."""
        start, stop = indices[0], indices[-1] + 1
        parts = []
        while start < stop:
            first = start % self.corpus.n_rows
            last = min(first + stop - start, self.corpus.n_rows)
            parts.append(self.corpus.rows(first, last))
            start += last - first
        return torch.from_numpy(np.concatenate(parts))


def _batch(rows: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": rows}


def next_token_loss(model: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of each next token, nats; rows [batch, position]."""
    logits = model(input_ids=rows).logits[:, :-1].float()
    return cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


class _Trainer(Trainer):
    """The Trainer without what a plain next-token loss on rows of one length does not need; hands on every loss."""

    def __init__(self, *args: Any, on_loss: Callable[[torch.Tensor], None], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.on_loss = on_loss

    def compute_loss(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, model: torch.nn.Module, inputs: dict[str, Any], **_: Any
    ) -> torch.Tensor:
        return next_token_loss(model, inputs["input_ids"])

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        # The default walks over all parameters at every step, for a number that we do not report.
        return 0

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.on_loss(loss)
        return loss


class _Session(TrainerCallback):
    """One call of the Trainer: logs, evaluates, keeps checkpoints, and leaves a state to go on from.

    Everything is ordered so that a kill between any two writes is harmless: a checkpoint appears by renaming; the
    state's folder counts only once the pointer names it; the pointer carries the log, so the log file is only a copy.
    """

    def __init__(self, manifest: Manifest, corpus: Corpus, out: Path) -> None:
        self.manifest = manifest
        self.out = out
        self.main = PartialState().is_main_process
        settings = manifest.train
        self.checkpoints = set(checkpoint_steps(manifest.steps, settings.n_checkpoints))
        self.log_every = max(1, manifest.steps // _LOG_LINES)
        self.tokenizer = word_level_tokenizer(corpus.grammar)
        held_out = corpus.held_out(
            "test" if corpus.split == "validation" else "validation", tokens=settings.eval_rows * corpus.context
        )
        self.eval_rows = torch.from_numpy(held_out.rows(0, settings.eval_rows))
        self.log: list[dict[str, float | None]] = []
        self.loss_sum: torch.Tensor | float = 0.0
        self.loss_count = 0
        self.learning_rate = 0.0
        self.last_save = time.monotonic()
        self.save_seconds = 0.0
        self.trainer = self._make_trainer(corpus)

    def _make_trainer(self, corpus: Corpus) -> _Trainer:
        settings = self.manifest.train
        model = self.manifest.model.build(
            vocab_size=corpus.grammar.vocab_size,
            eos_token_id=corpus.grammar.eos_token_id,
            n_ctx=corpus.context,
            seed=settings.seed,
        )
        arguments = TrainingArguments(
            output_dir=str(self.out / TRAINER),
            max_steps=self.manifest.steps,
            per_device_train_batch_size=settings.batch_size // PartialState().num_processes,
            learning_rate=settings.learning_rate,
            adam_beta1=settings.betas[0],
            adam_beta2=settings.betas[1],
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.max_grad_norm,
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr_rate": settings.final_lr_fraction},
            warmup_steps=settings.warmup_steps,
            optim="adamw_torch_fused",
            seed=settings.seed,
            bf16=_uses_bf16(),
            train_sampling_strategy="sequential",
            dataloader_drop_last=True,
            dataloader_pin_memory=torch.cuda.is_available(),
            remove_unused_columns=False,
            logging_strategy="no",
            save_strategy="no",
            eval_strategy="no",
            logging_nan_inf_filter=False,
            disable_tqdm=True,
            report_to="none",
        )
        # Several devices in one process would multiply the batch (DataParallel); several processes share it.
        arguments._n_gpu = min(1, arguments.n_gpu)
        trainer = _Trainer(
            model,
            arguments,
            data_collator=_batch,  # pyright: ignore[reportArgumentType]
            train_dataset=_Rows(corpus, self.manifest.steps * settings.batch_size),
            callbacks=[self],
            on_loss=self._add_loss,
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    @property
    def model(self) -> PreTrainedModel:
        return self.trainer.model  # pyright: ignore[reportReturnType]

    def run(self) -> None:
        """Train from the start or from the state that the last call left."""
        step, state = self._resume()
        if state is None:
            self._log_line(0)
            self._save_weights(0)
        if step == self.manifest.steps:
            return
        with track(
            f"training {'/'.join(self.out.parts[-2:])}", total=self.manifest.steps, completed=step
        ) as self.advance:
            self.trainer.train(resume_from_checkpoint=str(state) if state else None)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Log, evaluate, keep a checkpoint and ask for the trainer's state to be saved, each when it is due."""
        step = state.global_step
        is_checkpoint = step in self.checkpoints
        self.advance()
        if is_checkpoint or step % self.log_every == 0:
            self._log_line(step)
        if is_checkpoint:
            self._save_weights(step)
        pause = max(_STATE_SECONDS, _STATE_SHARE * self.save_seconds)
        if is_checkpoint or time.monotonic() - self.last_save > pause:
            control.should_save = True
            self.save_started = time.monotonic()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Point to the state that the Trainer has just written, then remove those before it."""
        if not self.main:
            return
        folder = self.out / TRAINER
        pointer = {
            "step": state.global_step,
            # A float32 survives the way through a decimal float64 exactly.
            "loss_sum": float(self.loss_sum),
            "loss_count": self.loss_count,
            "log": self.log,
        }
        write_whole(folder / _POINTER, json.dumps(pointer))
        _remove_states(folder, keep=state.global_step)
        self.last_save = time.monotonic()
        self.save_seconds = self.last_save - self.save_started

    def _resume(self) -> tuple[int, Path | None]:
        """The step and the folder of the trainer's last complete state; 0 and None without one."""
        folder = self.out / TRAINER
        if not (folder / _POINTER).is_file():
            if self.main:
                _remove_states(folder, keep=None)
            return 0, None
        pointer = json.loads((folder / _POINTER).read_text(encoding="utf-8"))
        step = pointer["step"]
        if self.main:
            _remove_states(folder, keep=step)
        self.log = pointer["log"]
        self.loss_count = pointer["loss_count"]
        self.loss_sum = torch.tensor(pointer["loss_sum"], device=self.model.device)
        return step, folder / f"checkpoint-{step}"

    def _add_loss(self, loss: torch.Tensor) -> None:
        self.loss_sum = self.loss_sum + loss
        self.loss_count += 1
        scheduler: Any = self.trainer.lr_scheduler
        self.learning_rate = scheduler.get_last_lr()[0]

    def _log_line(self, step: int) -> None:
        """Add a line to the log; stop here if the loss is no longer a number, before anything bad is saved."""
        loss: float | None = None
        learning_rate: float | None = None
        if self.loss_count:
            total = torch.as_tensor(self.loss_sum, device=self.model.device)
            mean = torch.as_tensor(self.trainer.accelerator.gather(total)).mean().item()
            loss, learning_rate = mean / self.loss_count, self.learning_rate
            self.loss_sum, self.loss_count = 0.0, 0
        eval_loss = self._evaluate() if step in self.checkpoints else None
        bad = [value for value in (loss, eval_loss) if value is not None and not math.isfinite(value)]
        if bad:
            before = self.log[-1]["step"] if self.log else 0
            good = max(_saved_steps(self.out), default=None)
            raise TrainingError(
                f"{self.out}: the loss became {bad[0]} between steps {before} and {step}; the last good checkpoint is "
                f"that of step {good}. Train into another folder with a lower learning_rate, a longer warm-up or a "
                "smaller max_grad_norm"
            )
        self.log.append({"step": step, "loss": loss, "eval_loss": eval_loss, "learning_rate": learning_rate})
        if self.main:
            write_whole(self.out / LOG, "".join(json.dumps(line) + "\n" for line in self.log))

    @torch.no_grad()
    def _evaluate(self) -> float:
        """Mean next-token loss on the validation rows, nats."""
        model, batch_size = self.model, self.manifest.train.batch_size
        model.eval()
        total = 0.0
        for rows in self.eval_rows.split(batch_size):
            total += float(next_token_loss(model, rows.to(model.device))) * len(rows)
        model.train()
        return total / len(self.eval_rows)

    def _save_weights(self, step: int) -> None:
        """Keep a checkpoint: all of it or, after a kill, nothing."""
        folder = checkpoint_folder(self.out, step)
        if not self.main or folder.exists():
            return
        temporary = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        self.model.save_pretrained(temporary)
        self.tokenizer.save_pretrained(temporary)
        temporary.rename(folder)


def _saved_steps(out: Path) -> list[int]:
    return [int(folder.name.removeprefix("step-")) for folder in (out / CHECKPOINTS).glob("step-*")]


def _remove_states(folder: Path, *, keep: int | None) -> None:
    for state in folder.glob("checkpoint-*"):
        if state.name != f"checkpoint-{keep}":
            shutil.rmtree(state)
