"""What can be wrong with a model that is to be loaded: one class for each cause, all of them `ModelLoadError`."""

from __future__ import annotations

from mechhier.text import printable


class ModelLoadError(ValueError):
    """A model could not be loaded; the message says what was wrong and what to do.

    Messages quote names and settings of files that anybody may have written: they are made `printable`.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class UnsupportedModelError(ModelLoadError):
    """The model has a feature that the requested hooked class, or the requested processing, cannot represent."""


class ModelNotFoundError(ModelLoadError):
    """There is no such folder, the folder holds no model, or the hub has no such name (or shows it to members only)."""


class MissingRevisionError(ModelLoadError):
    """The repository or the folder of revisions has none of that name; the message names the nearest ones."""


class HubUnreachableError(ModelLoadError):
    """The hub cannot be reached and its cache lacks what is needed; the message has the command that fetches it."""


class IncompleteWeightsError(ModelLoadError):
    """A weight file is absent or cut short, or the files lack a weight of the model; the message names them."""


class UnexpectedWeightsError(ModelLoadError):
    """The files hold weights that the config does not ask for: what would be loaded is a part of the model."""


class WeightShapeError(ModelLoadError):
    """A weight in the files has another shape than the config says; the message has both."""


class QuantizedWeightsError(ModelLoadError):
    """The weights are stored in fewer than 16 bits, by the config or by their dtype."""


class ChangedModelError(ModelLoadError):
    """The model has an adapter, hooks or replaced functions, which a hooked model would leave out; the message says where."""


class TokenizerError(ModelLoadError):
    """Files of a tokenizer are there, but they give none; the message says what is wrong with them."""


class UnreadableFileError(ModelLoadError):
    """A file may not be read, is no file, is larger than any of its kind, or is not in the format it should be in."""


class NoSafetensorsError(ModelLoadError):
    """The model has no safetensors weights, at most pickled ones, which are never opened."""


class WrongDtypeError(ModelLoadError):
    """The dtype is not one that a model can be loaded in."""


class NotEnoughMemoryError(ModelLoadError):
    """The weights do not fit into the free memory of the device; known from the files' headers, before loading."""


class CapabilityError(ValueError):
    """The model was seen, when it was loaded, not to do what a measure needs; the message says what was seen."""
