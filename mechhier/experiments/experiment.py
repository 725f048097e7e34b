"""What an experiment is, read from YAML, every field used or refused; and how it is carried out."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from pydantic import Field, PrivateAttr, field_validator, model_validator

from mechhier import results
from mechhier.files import LOCK, absolute, only_process_in, remove_leftovers, write_whole
from mechhier.grammars import AnyGrammar, Corpus, Grammar
from mechhier.grammars.families import FAMILIES, expand_family, is_family
from mechhier.models import ModelSpec, TrainSpec
from mechhier.models.spec import MOST_BYTES
from mechhier.reading import read_json, read_text
from mechhier.specs import Described, Flag, Text, Whole, read_spec, shown

if TYPE_CHECKING:
    from mechhier.models import Run

MOST_ABOUT = 10_000
MOST_NAME = 100
MOST_ARMS = MOST_SEEDS = 1_000
Title = Annotated[Text, Field(max_length=500)]
"""A line of text."""


EXPERIMENT = "experiment.json"
RESULTS = "results.nc"
_LISTED = 10
_MOST_BYTES = 2**26


class ExperimentError(ValueError):
    """An experiment cannot be carried out in a folder; the message says why and what to do."""


class Arm(Described):
    """One language and the training on it; arms differ in nothing but what is written here."""

    title: Title
    """Name in figures."""
    about: Annotated[Text, Field(max_length=MOST_ABOUT)]
    """What the language has and lacks, in plain words, for the report."""
    grammar: AnyGrammar
    """The language; its `context` is the length of a row."""
    train: TrainSpec
    """How long and how to train; `steps` is required, `seed` is the experiment's."""
    _family: dict[str, Any] | None = PrivateAttr(None)
    """The description of a grammar that a family draws from a seed of its own; `grammar` has only the rules."""

    @model_validator(mode="wrap")
    @classmethod
    def _keep_family(cls, fields: Any, validate: Callable[[Any], Arm]) -> Arm:
        arm = validate(fields)
        described = fields.get("grammar") if isinstance(fields, Mapping) else None
        if is_family(described) and "seed" in inspect.signature(FAMILIES[described["kind"]]).parameters:
            arm._family = {"seed": 0, **described}
        return arm

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Arm:
        """A validated copy with some fields changed."""
        copy = super().model_copy(update=update, deep=deep)
        if "grammar" not in (update or {}):
            copy._family = self._family
        return copy

    @model_validator(mode="after")
    def _check_steps(self) -> Arm:
        if self.train.steps is None:
            raise ValueError("train.steps is required in an experiment: it decides how much text is generated")
        if "seed" in self.train.model_fields_set:
            raise ValueError("train.seed is given by the experiment's seeds: leave it out")
        Training("", self, 0, None).corpus()  # refused here, not when the arms before have been trained
        return self

    @property
    def language_seed(self) -> int | None:
        """The seed that the language is drawn from; None where nothing is (given rules, or nothing but fresh lexicons)."""
        if self._family is not None:
            return int(self._family["seed"])
        return self.grammar.language_seed if self.grammar.is_drawn else None

    def language(self, language_seed: int | None) -> Grammar:
        """The arm's language as it is drawn from another seed; as given if None."""
        if language_seed is None:
            return self.grammar
        if self._family is not None:
            return expand_family(self._family | {"seed": language_seed})
        return self.grammar.model_copy(update={"language_seed": language_seed})


class Training(NamedTuple):
    """One training of an experiment."""

    arm_name: str
    arm: Arm
    seed: int
    """Of the text and of the weights."""
    language_seed: int | None
    """Of what the language draws once; None where it draws nothing."""

    def corpus(self) -> Corpus:
        """The text of one pass: nothing is read twice."""
        language, train = self.arm.language(self.language_seed), self.arm.train
        assert train.steps is not None
        return language.corpus(train.steps * train.batch_size * language.default_context, seed=self.seed)


class Experiment(Described):
    """Arms, one model shape for all of them, and the phenomena to measure at every checkpoint.

    Example:
        >>> list(Experiment.read("demo").trainings)
        ['pool', 'per_document', 'fixed', 'ngram']
    """

    title: Title
    """Title of the report."""
    seeds: Annotated[
        tuple[Annotated[Whole, Field(ge=0, lt=2**32)], ...], Field(min_length=1, max_length=MOST_SEEDS)
    ] = (0,)
    """Every arm is trained once with each: the seed of its text and of its weights. The first is that of the
    measurements, too."""
    vary_language: Flag = True
    """Whether a seed also draws the language anew (its lexicons, its table of n-grams, a family's rules), so that what is
    found over seeds is not found of one table: a training's `language_seed` is its arm's plus its seed. False: one language
    for all seeds."""
    arms: Annotated[dict[Annotated[Text, Field(max_length=MOST_NAME)], Arm], Field(min_length=1, max_length=MOST_ARMS)]
    """Arms by short name, which is also their folder."""
    model: ModelSpec
    """The transformer trained on every arm."""
    phenomena: Annotated[dict[Text, dict[Text, Any]], Field(min_length=1)]
    """Keyword arguments by name of phenomenon."""

    @field_validator("seeds")
    @classmethod
    def _check_seeds(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"seeds={list(seeds)} repeat; each training has a seed of its own")
        return seeds

    @field_validator("arms")
    @classmethod
    def _check_names(cls, arms: dict[str, Arm]) -> dict[str, Arm]:
        for name in arms:
            if not name.isidentifier():
                raise ValueError(f"arm {name!r}: a name consists of letters, digits and underscores")
        return arms

    @model_validator(mode="after")
    def _check_shape(self) -> Experiment:
        for name, arm in self.arms.items():
            context, n_words = arm.grammar.default_context, arm.grammar.vocab_size
            if self.model.n_ctx is not None and self.model.n_ctx < context:
                raise ValueError(
                    f"the rows of arm {name}, {context} tokens, do not fit the model's n_ctx={self.model.n_ctx}"
                )
            if 4 * 2 * n_words * self.model.d_model > MOST_BYTES:
                raise ValueError(
                    f"the embeddings of arm {name}'s {n_words:,} tokens in d_model={self.model.d_model} take more than "
                    f"{MOST_BYTES // 2**30:,} GiB"
                )
        return self

    @field_validator("phenomena")
    @classmethod
    def _check_options(cls, phenomena: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        from mechhier.phenomena.registry import check_options

        return {name: check_options(name, options, written=True) for name, options in phenomena.items()}

    @classmethod
    def read(cls, source: str | Path) -> Experiment:
        """Read a spec from a YAML file, or one that comes with the package by its name ("demo").

        Raises:
            SpecError: No such file, not YAML, or a field that is wrong or unknown.
        """
        return read_spec(cls, source, package="mechhier.experiments")

    @property
    def trainings(self) -> dict[str, Training]:
        """Every arm with every seed, by name: the arm's, or with several seeds `<arm>_seed<seed>`."""
        several = len(self.seeds) > 1
        return {
            f"{name}_seed{seed}" if several else name: Training(name, arm, seed, self._language_seed(arm, seed))
            for name, arm in self.arms.items()
            for seed in self.seeds
        }

    def _language_seed(self, arm: Arm, seed: int) -> int | None:
        if arm.language_seed is None:
            return None
        return arm.language_seed + (seed if self.vary_language else 0)

    def train(self, out: str | Path, *, only: str | None = None, report_to: Sequence[str] = ()) -> dict[str, Run]:
        """Train every arm with every seed, each in the folder `<out>/<name>/run`; go on where it stopped.

        Args:
            out: Folder of the trainings.
            only: Name of the one training to do, of `trainings`; all if None.
            report_to: Where else to log, as for `mechhier.train`.

        Raises:
            ExperimentError: `only` names none of them, or `out` holds another experiment.
            RunError: A folder holds another training, or another process trains there.
            TrainingError: A loss diverged, or the disk is too small.
        """
        from mechhier.models import train

        out = absolute(out)
        self._check_folder(out)
        if only is not None and only not in self.trainings:
            raise ExperimentError(f"no training {shown(only)}: choose from {', '.join(self.trainings)}")
        runs = {}
        for name, training in self.trainings.items():
            if only in (None, name):
                runs[name] = train(
                    self.model,
                    training.corpus(),
                    out / name / "run",
                    train=training.arm.train.model_copy(update={"seed": training.seed}),
                    report_to=report_to,
                    arm=training.arm_name,
                )
        return runs

    def run(self, out: str | Path) -> Path:
        """Train, measure every checkpoint, and write the report; go on where it stopped.

        What fails of the measurements is listed in the report, and by `mechhier.sweeps.failures` of `results.nc`; a
        `SweepWarning` says so at the end.

        Args:
            out: Folder of everything: `experiment.json` (which experiment it is), `<name>/run` of each training
                (checkpoints, log, one file per measurement), `results.nc` (all measurements in one netCDF),
                `report.html`, `figures/*.png`.

        Returns:
            The report.

        Raises:
            ExperimentError: `out` holds another experiment (other arms, seeds or another model; title, words and phenomena
                may change), or another process works there.
            RunError, TrainingError: As `train`.
        """
        from mechhier.experiments.summary import write_summary
        from mechhier.report.html import IMAGE_FOLDER
        from mechhier.sweeps import sweep

        out = absolute(out)
        self._check_folder(out)
        busy = f"another process is working in {out} (it holds {out / LOCK}): wait for it, or choose another folder"
        with only_process_in(out, otherwise=ExperimentError(busy)):
            self._check_folder(out)
            remove_leftovers(out / IMAGE_FOLDER)
            write_whole(out / EXPERIMENT, json.dumps(self._described(), indent=1) + "\n")
            runs = self.train(out)
            tree = sweep(runs, self.phenomena, seed=self.seeds[0])
            results.save(tree, out / RESULTS)
            return write_summary(self, runs, tree, out)

    def _described(self) -> dict[str, Any]:
        """What makes it another experiment: the model, and of every training the language and how it is trained."""
        trainings = {
            name: {
                "grammar": training.arm.language(training.language_seed).model_dump(mode="json"),
                "train": training.arm.train.model_dump(mode="json"),
                "seed": training.seed,
            }
            for name, training in self.trainings.items()
        }
        return {"model": self.model.model_dump(mode="json"), "trainings": trainings}

    def _check_folder(self, out: Path) -> None:
        """Refuse a folder of another experiment; one whose record cannot be read is known by its runs' own manifests."""
        from mechhier.models.run import differences

        if out.exists() and not out.is_dir():
            raise ExperimentError(f"{out} is a file; out must be a folder")
        try:
            there = read_json(read_text(out / EXPERIMENT, most_bytes=_MOST_BYTES), EXPERIMENT)
        except (OSError, ValueError):
            return
        if isinstance(there, dict) and (differing := differences(there, json.loads(json.dumps(self._described())))):
            more = f"\n  and {len(differing) - _LISTED} more" if len(differing) > _LISTED else ""
            raise ExperimentError(
                f"{out} holds another experiment; choose another folder or remove it. It differs in (there -> here):\n  "
                + "\n  ".join(differing[:_LISTED])
                + more
            )
