"""Training by `transformers.Trainer`: exact to resume, a checkpoint grid, one small log.

What is exact: on one CPU, or with deterministic kernels, a training that was killed at any moment and called again
ends in bitwise the same weights as an uninterrupted one, with the same number of threads. Several processes
(`accelerate launch`, `torchrun`) share a batch, one device each.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import math
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from accelerate.utils import broadcast, broadcast_object_list
from jaxtyping import Float, Int
from rich.filesize import decimal
from safetensors.torch import save as safetensors_bytes
from torch import Tensor
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
from transformers.integrations.integration_utils import TensorBoardCallback

from mechhier import hashes, results
from mechhier.files import (
    LOCK,
    absolute,
    errors_name,
    is_leftover,
    make_folder,
    new_folder,
    only_process_in,
    remove_leftovers,
    write_whole,
)
from mechhier.grammars import Corpus
from mechhier.models.environment import on_cpu, only_processes_and_devices, processes
from mechhier.models.quiet import quiet_transformers
from mechhier.models.run import (
    CHECKPOINTS,
    EVALUATION,
    FLOOR,
    LOG,
    MANIFEST,
    Manifest,
    Run,
    RunError,
    checkpoint_folder,
    kept_steps,
    package_versions,
    text_sha256,
)
from mechhier.models.spec import ModelSpec, TrainSpec
from mechhier.models.tokenizer import word_level_tokenizer
from mechhier.models.torch_state import default_torch_state, full_matmul_precision
from mechhier.progress import announce, track

TRAINER = "trainer"
_LOG_LINES = 200
# Between checkpoints the trainer's state is saved every half minute, but never for more than 1/50 of the time.
_STATE_SECONDS = 30.0
_STATE_SHARE = 50.0
# float32 weights and AdamW's two moments.
_STATE_WEIGHTS = 3
# In a state: all that is not the model's, the optimizer's and the schedule's.
_PROGRESS = "progress.json"
# The default warm-up: steps, and the part of a short training.
_WARMUP = 100
_WARMUP_SHARE = 3
# See `diverged`: log points in a row, and nats.
_LOST_LINES = 10
_LEARNED = 0.5
_ABOVE_UNTRAINED = 1.0


class TrainingError(ValueError):
    """Training cannot begin or go on; the message says why, at which step, and what to do."""


def train(
    spec: ModelSpec,
    corpus: Corpus,
    out: str | Path,
    *,
    train: TrainSpec | None = None,
    report_to: Sequence[str] = (),
    arm: str | None = None,
) -> Run:
    """Train a model on a corpus, or go on with a training that was interrupted, or return one that has finished.

    Batch n is rows n B to (n + 1) B of the corpus (modulo its length), the loss is the mean cross-entropy of the next
    token in nats. The first token of a row is never predicted. At every checkpoint the loss is measured on held-out
    rows, by position, beside the ideal predictor's on the same rows (the floor).

    On a GPU: bfloat16 autocast over float32 weights, fused AdamW, SDPA and `torch.compile`, unless `TrainSpec` says
    otherwise; on a CPU float32. Started by `accelerate launch` or `torchrun`, the processes share each batch.

    What is trained is what the settings say: neither accelerate's environment variables of precision and compilation
    nor the caller's default dtype, autocast, gradient or inference mode have a part in it. A caller's settings are as
    they were afterwards.

    Args:
        spec: Shape of the model.
        corpus: Text to train on; its validation split (its test split, if it is itself the validation split) measures
            `eval_loss`.
        out: Folder of the run; made if absent, and gone on with if it holds the same training.
        train: How to train; the defaults of `TrainSpec` if None.
        report_to: Where else to log, by `transformers`' names: `"tensorboard"` (in `out/tensorboard`), `"wandb"`, ...
        arm: The arm of the experiment that this is a training of, for the manifest and every result.

    Returns:
        The finished run.

    Raises:
        RunError: `out` holds another training or something else, or another process is training in it; nothing is
            touched.
        TrainingError: The disk has too little room; or the loss is not finite, or has diverged.
        EnvironmentVariableError: Environment variables speak of other processes without saying where they are, or ask
            for a model divided among devices (FSDP, DeepSpeed); nothing is touched.
        ValueError: The corpus's rows are longer than the model's context, or it is shorter than one batch.

    Cost: `steps` forward and backward passes, and `eval_rows` forward rows at each checkpoint; the floor of `eval_rows`
    rows once. Disk: the weights at each checkpoint, and up to six times the weights until the end, for resuming. At the
    end the text is made or read once more, for its hash.
    """
    out = absolute(out)
    with default_torch_state(), only_processes_and_devices():
        return _train(_plan(spec, corpus, train or TrainSpec(), arm), corpus, out, report_to)


def _train(manifest: Manifest, corpus: Corpus, out: Path, report_to: Sequence[str]) -> Run:
    with ExitStack() as held:
        if not _begun(manifest, corpus, out, held):
            return Run.open(out)
        held.enter_context(_callers_random_state())
        held.enter_context(quiet_transformers())
        session = _Session(manifest, corpus, out, report_to)
        session.run()
        if processes().is_main_process:
            _finish(manifest, corpus, out, session.written)
        processes().wait_for_everyone()
    return Run.open(out)


def _begun(manifest: Manifest, corpus: Corpus, out: Path, held: ExitStack) -> bool:
    """Whether there is something to train; then the folder is this training's, until `held` is closed.

    Raises:
        RunError: Another process trains there, or the folder holds something else.
        TrainingError: The disk has too little room. All processes raise what the first does.
    """
    said: list[Any] = [None]
    if processes().is_main_process:
        try:
            # What has finished is returned without the lock: the folder may be someone else's.
            if not _has_finished(existing := _check_folder(out, manifest)):
                busy = (
                    f"another process is training in {out} (it holds {out / LOCK}): wait for it, or choose another "
                    "folder"
                )
                held.enter_context(only_process_in(out, otherwise=RunError(busy)))
                # Until the lock was held, another process may have begun or finished.
                existing = _check_folder(out, manifest)
            if _has_finished(existing):
                shutil.rmtree(out / TRAINER, ignore_errors=True)  # a kill just before the end leaves it
            else:
                _announce(manifest, corpus, out)
                for folder in (out / CHECKPOINTS, out / TRAINER):
                    make_folder(folder)
                    remove_leftovers(folder)
                if existing is None:
                    manifest.write(out)
            said = [not _has_finished(existing)]
        except (RunError, TrainingError, OSError) as error:
            said = [error]
    # A refusal in one process only would leave the others waiting for it.
    begun = broadcast_object_list(said)[0]
    if isinstance(begun, Exception):
        raise begun
    return begun


def _has_finished(manifest: Manifest | None) -> bool:
    return manifest is not None and manifest.finished


def _finish(manifest: Manifest, corpus: Corpus, out: Path, written: dict[str, str]) -> None:
    """Say that the training has finished, with the hashes of all that was written when it was."""
    hashes.write(out / hashes.LIST, written)
    finished = {
        "finished": True,
        "files_sha256": hashes.of_file(out / hashes.LIST),
        "all_text_sha256": text_sha256(corpus, manifest.steps * manifest.train.batch_size),
    }
    manifest.model_copy(update=finished).write(out)
    shutil.rmtree(out / TRAINER, ignore_errors=True)


def _plan(spec: ModelSpec, corpus: Corpus, train: TrainSpec, arm: str | None = None) -> Manifest:
    """Everything that is decided before the first step; refuses what cannot work."""
    if spec.n_ctx is not None and spec.n_ctx < corpus.context:
        raise ValueError(f"the corpus's rows of {corpus.context} tokens do not fit the model's n_ctx={spec.n_ctx}")
    steps = train.steps or corpus.n_rows // train.batch_size
    warmup = min(_WARMUP, steps // _WARMUP_SHARE) if train.warmup_steps is None else train.warmup_steps
    if steps <= warmup:
        raise ValueError(
            f"one pass over {corpus.n_rows} rows is {steps} steps of {train.batch_size} rows, which must be more than "
            f"warmup_steps={warmup}: use a longer corpus, smaller batches, a shorter warm-up, or give steps"
        )
    if beyond := [step for step in train.checkpoints_at if step > steps]:
        raise ValueError(f"checkpoints_at={beyond} lie beyond the {steps} steps of one pass over the corpus")
    n_processes = processes().num_processes
    if train.batch_size % (n_processes * train.gradient_accumulation):
        raise ValueError(
            f"batch_size={train.batch_size} must be divisible by {n_processes} processes x "
            f"gradient_accumulation={train.gradient_accumulation}"
        )
    device = processes().device or torch.device("cpu")
    precision = "bfloat16 autocast" if _uses_bf16(train) else "float32"
    compiled = ", compiled" if _compiles(train) else ""
    return Manifest(
        model=spec,
        train=train.model_copy(update={"warmup_steps": warmup}),
        corpus=corpus.description,
        text_sha256=text_sha256(corpus),
        steps=steps,
        device=f"{n_processes} x {device.type}, {precision}{compiled}",
        versions=package_versions(),
        arm=arm,
    )


def _uses_bf16(train: TrainSpec) -> bool:
    if train.precision == "auto":
        return not on_cpu() and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return train.precision == "bfloat16"


def _compiles(train: TrainSpec) -> bool:
    return not on_cpu() and torch.cuda.is_available() if train.compile is None else train.compile


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
        if not existing.finished and existing.format != manifest.format:
            raise RunError(
                f"the training in {out} was begun by mechhier {existing.versions.get('mechhier')}, and this version cannot "
                "go on with it: choose another folder or remove it"
            )
        return existing
    # A kill before the manifest was renamed into place leaves only our own temporary file and an empty folder.
    ours = {CHECKPOINTS, TRAINER, LOCK}
    if out.is_dir() and any(path.name not in ours and not is_leftover(path) for path in out.iterdir()):
        raise RunError(f"{out} is not empty and not a run; choose another folder")
    return None


def _announce(manifest: Manifest, corpus: Corpus, out: Path) -> None:
    """Say what will be trained and what it takes on disk; refuse if there is not that much."""
    vocab_size, n_ctx = corpus.grammar.vocab_size, corpus.context
    n_parameters = manifest.model.n_parameters(vocab_size, n_ctx=n_ctx)
    weights = manifest.model.n_bytes(vocab_size, n_ctx=n_ctx)
    n_kept, n_saved = len(manifest.checkpoint_steps), len(kept_steps(out))
    # The state for resuming is on disk twice: the last one, and the one before until the next counts.
    needed = weights * (max(n_kept - n_saved, 0) + 2 * _STATE_WEIGHTS)
    free = shutil.disk_usage(out).free
    tokens = manifest.train.batch_size * corpus.context
    announce(
        f"{out}: {manifest.model.architecture} of {n_parameters:,} parameters on "
        f"{manifest.device}; {manifest.steps:,} steps of {tokens:,} tokens. Disk: {n_kept} checkpoints of "
        f"{decimal(weights)}, {decimal(n_kept * weights)} in all, and up to {decimal(2 * _STATE_WEIGHTS * weights)} for "
        f"resuming until the end ({decimal(free)} free)"
    )
    if needed > free:
        raise TrainingError(
            f"{out}: {decimal(needed)} are needed on disk and {decimal(free)} are free. Use fewer checkpoints "
            f"(n_checkpoints={manifest.train.n_checkpoints}), a smaller model, or a folder on another disk"
        )


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
    """The rows of all steps in order, read a batch at a time, the next batch while this one is trained on.

    Args:
        corpus: The text.
        n_rows: Rows of all steps, which may be more than the corpus has.
        stride: Rows from the beginning of one batch to that of the next which this process asks for.
    """

    def __init__(self, corpus: Corpus, n_rows: int, *, stride: int) -> None:
        self.corpus = corpus
        self.n_rows = n_rows
        self.stride = stride
        self._reader = ThreadPoolExecutor(max_workers=1)
        self._ahead: tuple[tuple[int, int], Future[Tensor]] | None = None

    def __len__(self) -> int:
        return self.n_rows

    def __getitems__(self, indices: Sequence[int]) -> Int[Tensor, "row context"]:
        """Rows of a batch of consecutive indices."""
        wanted = indices[0], indices[-1] + 1
        # One thread reads all batches, so that two never make the same block of text.
        ahead = self._ahead if self._ahead and self._ahead[0] == wanted else (wanted, self._read(*wanted))
        following = wanted[0] + self.stride, wanted[1] + self.stride
        self._ahead = following, self._read(*following)
        return ahead[1].result()

    def _read(self, start: int, stop: int) -> Future[Tensor]:
        return self._reader.submit(self._rows, start, stop)

    def _rows(self, start: int, stop: int) -> Tensor:
        parts = []
        while start < stop:
            first = start % self.corpus.n_rows
            last = min(first + stop - start, self.corpus.n_rows)
            parts.append(self.corpus.rows(first, last))
            start += last - first
        return torch.from_numpy(np.concatenate(parts))


def _batch(rows: Tensor) -> dict[str, Tensor]:
    return {"input_ids": rows}


def next_token_loss(model: torch.nn.Module, rows: Int[Tensor, "row context"], *, mean: bool = True) -> Tensor:
    """Cross-entropy of each next token in nats: its mean, or by row and position, `[row, context - 1]`."""
    logits = model(input_ids=rows).logits[:, :-1].float()
    loss = cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="mean" if mean else "none")
    return loss if mean else loss.view(len(rows), -1)


class _Trainer(Trainer):
    """The Trainer without what a plain next-token loss on rows of one length does not need; hands on every loss."""

    # The loss is a mean over the rows of one part of a batch: the Trainer divides it by the number of parts.
    loss_is_scaled_for_ga = False

    def __init__(self, *args: Any, on_loss: Callable[[Tensor], None], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.on_loss = on_loss

    def compute_loss(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, model: torch.nn.Module, inputs: dict[str, Any], **_: Any
    ) -> Tensor:
        return next_token_loss(model, inputs["input_ids"])

    def _save_checkpoint(self, *_: Any, **__: Any) -> None:
        # The session does (on_save): whole, with hashes, and without what a plain training does not need.
        pass

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        # The default walks over all parameters at every step, for a number that we do not report.
        return 0

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self.on_loss(loss)
        return loss


class _Session(TrainerCallback):
    """One call of the Trainer: logs, evaluates, keeps checkpoints, and leaves a state to go on from.

    Everything is ordered so that a kill or a cut between any two writes is harmless. A checkpoint and a state appear
    whole, by renaming; then a checkpoint's hashes are added to the run's list, and a state has its own within. A state
    carries the log, so the log file is only a copy. What is gone on from is the newest state that is as it was written,
    and whose checkpoints are; all that came after it is made again.
    """

    def __init__(self, manifest: Manifest, corpus: Corpus, out: Path, report_to: Sequence[str]) -> None:
        self.manifest = manifest
        self.out = out
        self.main = processes().is_main_process
        settings = manifest.train
        self.checkpoints = set(manifest.checkpoint_steps)
        self.log_every = max(1, manifest.steps // _LOG_LINES)
        self.tokenizer = word_level_tokenizer(corpus.grammar)
        self.step_tokens = settings.batch_size * corpus.context
        self.part_rows = settings.batch_size // (processes().num_processes * settings.gradient_accumulation)
        self.held_out = corpus.held_out(
            "test" if corpus.split == "validation" else "validation", tokens=settings.eval_rows * corpus.context
        )
        self.eval_rows = torch.from_numpy(self.held_out.rows(0, settings.eval_rows))
        self.floor: xr.Dataset | None = None
        self.evaluation: dict[str, list[float]] = {}
        self.log: list[dict[str, float | None]] = []
        self.part_losses: list[Tensor] = []
        self.losses: list[float] = []
        self.learning_rate = 0.0
        self.last_line = self.last_save = time.monotonic()
        self.tokens_since_line = 0
        self.note = ""
        self.save_seconds = 0.0
        self.state_step: int | None = None
        self.written: dict[str, str] = {}
        self.trainer = self._make_trainer(corpus, report_to)

    def _make_trainer(self, corpus: Corpus, report_to: Sequence[str]) -> _Trainer:
        settings = self.manifest.train
        model = self.manifest.model.build(
            vocab_size=corpus.grammar.vocab_size,
            eos_token_id=corpus.grammar.eos_token_id,
            n_ctx=corpus.context,
            seed=settings.seed,
        )
        arguments = TrainingArguments(
            output_dir=str(self.out / TRAINER),
            run_name="/".join(self.out.parts[-2:]),
            max_steps=self.manifest.steps,
            per_device_train_batch_size=self.part_rows,
            gradient_accumulation_steps=settings.gradient_accumulation,
            learning_rate=settings.learning_rate,
            adam_beta1=settings.betas[0],
            adam_beta2=settings.betas[1],
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.max_grad_norm,
            # Of transformers' cosines the one whose first step is not taken at a rate of 0, nor its last above the lowest.
            lr_scheduler_type="cosine_warmup_with_min_lr",
            lr_scheduler_kwargs={"min_lr_rate": settings.final_lr_fraction},
            warmup_steps=min(max(1, settings.warmup_steps or 0), self.manifest.steps - 1),
            optim="adamw_torch_fused",
            seed=settings.seed,
            use_cpu=on_cpu(),
            bf16=_uses_bf16(settings),
            torch_compile=_compiles(settings),
            tf32=False,
            train_sampling_strategy="sequential",
            dataloader_drop_last=True,
            ddp_find_unused_parameters=False,
            dataloader_pin_memory=not on_cpu(),
            remove_unused_columns=False,
            logging_strategy="no",
            save_strategy="no",
            eval_strategy="no",
            logging_nan_inf_filter=False,
            disable_tqdm=True,
            report_to=list(report_to) or "none",
        )
        # Several devices in one process would multiply the batch (DataParallel); several processes share it.
        arguments._n_gpu = min(1, arguments.n_gpu)
        trainer = _Trainer(
            model,
            arguments,
            data_collator=_batch,  # pyright: ignore[reportArgumentType]
            train_dataset=_Rows(
                corpus,
                self.manifest.steps * settings.batch_size,
                stride=self.part_rows * processes().num_processes,
            ),
            callbacks=[self],
            on_loss=self._add_loss,
        )
        trainer.remove_callback(PrinterCallback)
        for callback in trainer.callback_handler.callbacks:
            # Its default is inside the state for resuming, which is removed at the end.
            if isinstance(callback, TensorBoardCallback):
                callback.logging_dir = callback.logging_dir or str(self.out / "tensorboard")
        return trainer

    @property
    def model(self) -> PreTrainedModel:
        return self.trainer.model  # pyright: ignore[reportReturnType]

    def run(self) -> None:
        """Train from the start or from the state that the last call left."""
        with full_matmul_precision():  # which making the Trainer switches off for compiled models
            self._run()

    def _run(self) -> None:
        step, state = self._resume()
        self.floor = self._floor()
        name = "/".join(self.out.parts[-2:])
        with track(f"training {name}", total=self.manifest.steps, completed=step) as self.advance:
            if state is None:
                self._log_line(0)
                self._save_weights(0)
            if step < self.manifest.steps:
                self.trainer.train(resume_from_checkpoint=str(state) if state else None)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Log, evaluate, keep a checkpoint and ask for the trainer's state to be saved, each when it is due."""
        step = state.global_step
        is_checkpoint = step in self.checkpoints
        is_line = is_checkpoint or step % self.log_every == 0
        self.tokens_since_line += self.step_tokens
        if is_line:
            self._log_line(step)
        self.advance(note=self.note)
        if is_checkpoint:
            self._save_weights(step)
        if is_checkpoint or self._state_is_due(is_line):
            control.should_save = True
            self.save_started = time.monotonic()

    def _state_is_due(self, is_line: bool) -> bool:
        """Whether it is time to save the trainer's state; the processes' clocks differ, so the first one decides."""
        pause = max(_STATE_SECONDS, _STATE_SHARE * self.save_seconds)
        due = time.monotonic() - self.last_save > pause
        if processes().num_processes == 1:
            return due
        return is_line and bool(broadcast(torch.tensor(due, device=self.model.device)))

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        optimizer: torch.optim.Optimizer,
        lr_scheduler: torch.optim.lr_scheduler.LRScheduler,
        **_: Any,
    ) -> None:
        """Leave a state to go on from; the last one stays until the next, the one before makes room."""
        self._collect_losses()
        if self.main:
            _remove_states(self.out, but=self.state_step)
            weights = {name: weight.detach().cpu().contiguous() for name, weight in self.model.state_dict().items()}
            with new_folder(_state_folder(self.out, state.global_step)) as folder:
                (folder / "model.safetensors").write_bytes(safetensors_bytes(weights, metadata={"format": "pt"}))
                (folder / "optimizer.pt").write_bytes(_pickled(optimizer.state_dict()))
                (folder / "scheduler.pt").write_bytes(_pickled(lr_scheduler.state_dict()))
                state.save_to_json(str(folder / "trainer_state.json"))
                (folder / _PROGRESS).write_text(json.dumps({"losses": self.losses, "log": self.log}), encoding="utf-8")
                hashes.write(folder / hashes.LIST, hashes.of_folder(folder))
            self.state_step = state.global_step
        self.last_save = time.monotonic()
        self.save_seconds = self.last_save - self.save_started

    def _resume(self) -> tuple[int, Path | None]:
        """The step and the folder of the state to go on from, 0 and None without one; what came after it is removed."""
        written = hashes.read(self.out / hashes.LIST)
        # The first process looks, and all go on from what it found.
        step = broadcast_object_list([self._usable_state(written) if self.main else None])[0]
        if self.main:
            _remove_states(self.out, but=step)
            kept = [each for each in kept_steps(self.out) if step is not None and each <= step]
            for later in set(kept_steps(self.out)) - set(kept):
                shutil.rmtree(checkpoint_folder(self.out, later))
            inside = tuple(f"{self._name(each)}/" for each in kept)
            self.written = {n: digest for n, digest in written.items() if n == FLOOR or n.startswith(inside)}
            hashes.write(self.out / hashes.LIST, self.written)
        processes().wait_for_everyone()
        if step is None:
            return 0, None
        self.state_step = step
        folder = _state_folder(self.out, step)
        with errors_name(folder / _PROGRESS):
            progress = json.loads((folder / _PROGRESS).read_text(encoding="utf-8"))
        self.log, self.losses = progress["log"], progress["losses"]
        if self.main:
            self._write_log()
        return step, folder

    def _usable_state(self, written: dict[str, str]) -> int | None:
        """The step of the newest state that is as it was written, with all checkpoints up to it; says what is not."""
        states = sorted(_state_steps(self.out), reverse=True)
        damaged = []
        for step in self.manifest.checkpoint_steps if states else ():
            files = {name: digest for name, digest in written.items() if name.startswith(f"{self._name(step)}/")}
            folder = checkpoint_folder(self.out, step)
            if step <= states[0] and not hashes.is_as_written(folder, files, inside=self.out):
                damaged.append(step)
        usable = [step for step in states if step < min(damaged, default=math.inf) and self._is_as_written(step)]
        if states and (not usable or usable[0] != states[0]):
            what = f"the checkpoint of step {damaged[0]}" if damaged else f"the state of step {states[0]}"
            where = f"the state of step {usable[0]}" if usable else "the beginning"
            announce(f"{self.out}: {what} is not as it was written; going on from {where}")
        return usable[0] if usable else None

    def _is_as_written(self, step: int) -> bool:
        folder = _state_folder(self.out, step)
        return hashes.is_as_written(folder, hashes.read(folder / hashes.LIST))

    def _name(self, step: int) -> str:
        """What the files of a checkpoint begin with in the list of hashes."""
        return checkpoint_folder(Path(), step).as_posix()

    def _record(self, of: dict[str, str]) -> None:
        """Add what has been written to the list of hashes."""
        self.written |= of
        hashes.append(self.out / hashes.LIST, of)

    def _floor(self) -> xr.Dataset | None:
        """The ideal predictor's loss on the held-out rows; None where rows begin inside documents."""
        if self.held_out.packed:
            return None
        path = self.out / FLOOR
        if self.main and (FLOOR not in self.written or hashes.changed(self.out, {FLOOR: self.written[FLOOR]})):
            results.save(self.held_out.floor(len(self.eval_rows)), path)
            self._record({FLOOR: hashes.of_file(path)})
        processes().wait_for_everyone()
        return results.load(path)

    def _add_loss(self, loss: Tensor) -> None:
        self.part_losses.append(loss)
        scheduler: Any = self.trainer.lr_scheduler
        self.learning_rate = scheduler.get_last_lr()[0]

    def _collect_losses(self) -> None:
        """Wait for the device, and turn the losses of the parts on all devices into one of each step."""
        if not self.part_losses:
            return
        parts = torch.stack(self.part_losses)
        by_process = torch.as_tensor(self.trainer.accelerator.gather(parts[None]))
        by_step = by_process.cpu().double().mean(0).view(-1, self.manifest.train.gradient_accumulation).sum(1)
        self.losses += by_step.tolist()
        self.part_losses.clear()

    def _log_line(self, step: int) -> None:
        """Add a line to the log; stop here if the training has failed, before anything bad is saved."""
        self._collect_losses()
        bad = [i for i, loss in enumerate(self.losses) if not math.isfinite(loss)]
        if bad:
            raise self._failure(f"the loss was not finite at step {step - len(self.losses) + 1 + bad[0]}")
        line: dict[str, float | None] = {"step": step, "loss": None, "eval_loss": None, "floor": None}
        if self.losses:
            line["loss"] = math.fsum(self.losses) / len(self.losses)
        if step in self.checkpoints:
            self.evaluation = self._evaluate()
            line["eval_loss"] = math.fsum(self.evaluation["loss"]) / len(self.evaluation["loss"])
            if not math.isfinite(line["eval_loss"]):
                raise self._failure(f"the held-out loss was not finite at step {step}")
            if self.floor is not None and math.isfinite(self.floor.floor_mean):
                line["floor"] = float(self.floor.floor_mean)
        line["learning_rate"] = self.learning_rate if self.losses else None
        self.losses = []
        self.log.append(line)
        if divergence := diverged(self.log):
            raise self._failure(divergence)
        if self.main:
            self._write_log()
        self._report(line)

    def _write_log(self) -> None:
        content = "".join(json.dumps(line) + "\n" for line in self.log).encode()
        write_whole(self.out / LOG, content)
        self.written[LOG] = hashlib.sha256(content).hexdigest()  # in the list at the end: until then a state has it

    def _report(self, line: dict[str, float | None]) -> None:
        """Show loss and speed in the progress row, and hand them to whatever `report_to` names."""
        now = time.monotonic()
        speed = self.tokens_since_line / (now - self.last_line)
        self.last_line, self.tokens_since_line = now, 0
        values = {name: value for name, value in line.items() if value is not None and name != "step"}
        if "loss" in values:
            self.note = f"loss {values['loss']:.4f}, {speed:,.0f} tokens/s"
            values["tokens_per_second"] = speed
        self.trainer.log(values)

    def _failure(self, what: str) -> TrainingError:
        good = max(kept_steps(self.out), default=None)
        return TrainingError(
            f"{self.out}: {what}; the last good checkpoint is that of step {good}. Train into another folder with a "
            "lower learning_rate, a longer warm-up or a smaller max_grad_norm"
        )

    @torch.no_grad()
    def _evaluate(self) -> dict[str, list[float]]:
        """Next-token loss on the held-out rows by position from 1, in nats, and its standard error over rows."""
        model = self.model
        model.eval()
        # accelerate puts autocast around the model's own forward pass; evaluation is in float32.
        autocasting = model.__dict__.pop("forward", None)
        parts = [
            next_token_loss(model, rows.to(model.device), mean=False).cpu().double()
            for rows in self.eval_rows.split(self.part_rows)
        ]
        if autocasting is not None:
            model.__dict__["forward"] = autocasting
        model.train()
        losses: Float[Tensor, "row position"] = torch.cat(parts)
        error = losses.std(0) / math.sqrt(len(losses))
        return {"loss": losses.mean(0).tolist(), "loss_error": error.tolist()}

    def _save_weights(self, step: int) -> None:
        """Keep a checkpoint: all of it or, after a kill, nothing."""
        if not self.main:
            return
        folder = checkpoint_folder(self.out, step)
        with new_folder(folder) as temporary:
            try:
                self.model.save_pretrained(temporary)
                self.tokenizer.save_pretrained(temporary)
            except OSError:
                raise
            except Exception as error:
                # What the system refuses is another error in each of the libraries that write here.
                raise OSError(errno.EIO, f"a file in it cannot be written ({error})", str(folder)) from error
            (temporary / EVALUATION).write_text(json.dumps(self.evaluation) + "\n", encoding="utf-8")
            written = hashes.of_folder(temporary)
        self._record({f"{self._name(step)}/{name}": digest for name, digest in written.items()})


def diverged(log: Sequence[dict[str, float | None]]) -> str | None:
    """How the losses of a log show that training has diverged; None if they do not.

    It has if ten log points in a row lie above the middle between the untrained model's held-out loss and the lowest
    training loss so far, provided that half a nat had been learned; or, before that, 1 nat above the untrained model's.
    """
    untrained = log[0]["eval_loss"]
    lines = [(line["step"], line["loss"]) for line in log if line["loss"] is not None]
    if untrained is None or len(lines) < _LOST_LINES:
        return None
    losses = [loss for _, loss in lines if loss is not None]
    lowest = min(losses)
    limit = (untrained + lowest) / 2 if untrained - lowest > _LEARNED else untrained + _ABOVE_UNTRAINED
    if min(losses[-_LOST_LINES:]) <= limit:
        return None
    return (
        f"the loss has diverged: since step {lines[-_LOST_LINES][0]:.0f} it has been above {limit:.3g} nats, {losses[-1]:.3g} "
        f"at step {lines[-1][0]:.0f} (lowest so far {lowest:.3g}, untrained {untrained:.3g})"
    )


def _pickled(state: Any) -> bytes:
    # In memory: the writer of torch.save ends the process where a file cannot be written.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _state_folder(out: Path, step: int) -> Path:
    return out / TRAINER / f"step-{step}"


def _state_steps(out: Path) -> list[int]:
    names = [path.name.removeprefix("step-") for path in (out / TRAINER).glob("step-*")]
    return [int(name) for name in names if name.isdecimal()]


def _remove_states(out: Path, *, but: int | None) -> None:
    for step in _state_steps(out):
        if step != but:
            shutil.rmtree(_state_folder(out, step))
