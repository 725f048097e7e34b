"""What an experiment is, read from YAML, every field used or refused; and how it is carried out."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator, model_validator

from mechhier import results
from mechhier.grammars import AnyGrammar, Corpus, Grammar
from mechhier.grammars.families import FAMILIES, expand_family
from mechhier.models import ModelSpec, TrainSpec
from mechhier.specs import read_spec

if TYPE_CHECKING:
    from mechhier.models import Run

_NOT_OPTIONS = {"model", "tokens", "tasks", "seed"}
"""Arguments of a phenomenon that an experiment supplies itself or that YAML cannot hold."""


class Arm(BaseModel):
    """One language and the training on it; arms differ in nothing but what is written here."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str
    """Name in figures."""
    about: str
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
        if isinstance(described, Mapping) and described.get("kind") in FAMILIES:
            family = FAMILIES[str(described["kind"])]
            if "seed" in inspect.signature(family).parameters:
                arm._family = {str(option): value for option, value in described.items()}
        return arm

    @model_validator(mode="after")
    def _check_steps(self) -> Arm:
        if self.train.steps is None:
            raise ValueError("train.steps is required in an experiment: it decides how much text is generated")
        if "seed" in self.train.model_fields_set:
            raise ValueError("train.seed is given by the experiment's seeds: leave it out")
        return self

    @property
    def language_seed(self) -> int | None:
        """The seed that the language is drawn from; None where nothing is (given rules, or nothing but fresh lexicons)."""
        if self._family is not None:
            return self._family.get("seed", 0)
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


class Experiment(BaseModel):
    """Arms, one model shape for all of them, and the phenomena to measure at every checkpoint.

    Example:
        >>> list(Experiment.read("demo").trainings)
        ['pool', 'per_document', 'fixed', 'ngram']
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str
    """Title of the report."""
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, lt=2**32)], ...], Field(min_length=1)] = (0,)
    """Every arm is trained once with each: the seed of its text and of its weights. The first is that of the
    measurements, too."""
    vary_language: bool = True
    """Whether a seed also draws the language anew (its lexicons, its table of n-grams, a family's rules), so that what is
    found over seeds is not found of one table: a training's `language_seed` is its arm's plus its seed. False: one language
    for all seeds."""
    arms: Annotated[dict[str, Arm], Field(min_length=1)]
    """Arms by short name, which is also their folder."""
    model: ModelSpec
    """The transformer trained on every arm."""
    phenomena: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]
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

    @field_validator("phenomena")
    @classmethod
    def _check_options(cls, phenomena: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        from mechhier.phenomena import PHENOMENA

        for name, options in phenomena.items():
            if name not in PHENOMENA:
                raise ValueError(f"no phenomenon {name!r}: choose from {', '.join(PHENOMENA)}")
            accepted = set(inspect.signature(PHENOMENA[name]).parameters) - _NOT_OPTIONS
            if unknown := sorted(set(options) - accepted):
                raise ValueError(f"{name} has no options {unknown}: it takes {', '.join(sorted(accepted))}")
        return phenomena

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
            ValueError: `only` names none of them.
            RunError: A folder holds another training.
            TrainingError: A loss diverged, or the disk is too small.
        """
        from mechhier.models import train

        if only is not None and only not in self.trainings:
            raise ValueError(f"no training {only!r}: choose from {', '.join(self.trainings)}")
        runs = {}
        for name, training in self.trainings.items():
            if only in (None, name):
                runs[name] = train(
                    self.model,
                    training.corpus(),
                    Path(out) / name / "run",
                    train=training.arm.train.model_copy(update={"seed": training.seed}),
                    report_to=report_to,
                    arm=training.arm_name,
                )
        return runs

    def run(self, out: str | Path) -> Path:
        """Train, measure every checkpoint, and write the report; go on where it stopped.

        Args:
            out: Folder of everything: `<name>/run` of each training (checkpoints, log, one file per measurement),
                `results.nc` (all measurements in one netCDF), `report.html`, `figures/*.png`.

        Returns:
            The report.

        Raises:
            ValueError: `out` holds an experiment with other settings.
        """
        from mechhier.experiments.summary import write_summary
        from mechhier.sweeps import sweep

        out = Path(out)
        runs = self.train(out)
        tree = sweep(runs, self.phenomena, seed=self.seeds[0])
        results.save(tree, out / "results.nc")
        return write_summary(self, runs, tree, out)
