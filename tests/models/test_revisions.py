import datetime as dt
import json
import re
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

from mechhier import models
from mechhier.models.errors import HubUnreachableError, ModelLoadError, ModelNotFoundError
from mechhier.models.revision import Revision, nearest_revisions, parse_revision, revisions

OLMO = ["main", *(f"step{step}-tokens{round(step * 0.0042)}B" for step in range(738_000, 0, -1000))]
PYTHIA = ["main", "step0", *(f"step{2**i}" for i in range(10)), *(f"step{1000 * i}" for i in range(1, 144))]
OLMO_2 = [
    "main",
    "stage2-ingredient10-step1000-tokens5B",
    "stage2-ingredient2-step1000-tokens5B",
    "stage1-step2000-tokens9B",
    "stage1-step1000-tokens5B",
    "stage2-ingredient2-step11931-tokens50B",
    "step150-tokens1B",
    "step1000-tokens5B",
]


@pytest.fixture(autouse=True)
def hub(monkeypatch, tmp_path):
    """A hub whose answer a test sets, and which counts how often it was asked."""
    asked = SimpleNamespace(branches=OLMO, error=None, times=0)

    def list_repo_refs(self, name):
        asked.times += 1
        if asked.error is not None:
            raise asked.error
        return SimpleNamespace(branches=[SimpleNamespace(name=branch) for branch in asked.branches])

    monkeypatch.setattr(HfApi, "list_repo_refs", list_repo_refs)
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hf"))
    return asked


def steps(listed):
    return [revision.step for revision in listed]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("step1000-tokens4B", (1000, 4_000_000_000, None)),
        ("step556000-tokens2460B", (556_000, 2_460_000_000_000, None)),
        ("step143000", (143_000, None, None)),
        ("step0", (0, None, None)),
        ("stage1-step928646-tokens3896B", (928_646, 3_896_000_000_000, "stage1")),
        ("stage2-ingredient3-step11931-tokens50B", (11_931, 50_000_000_000, "stage2-ingredient3")),
        ("stage1-step1413814", (1_413_814, None, "stage1")),
        ("step10-tokens1.5M", (10, 1_500_000, None)),
        ("step_0100", (100, None, None)),
        ("checkpoint-500", (500, None, None)),
        ("global_step500", (500, None, None)),
        ("global_step_500", (500, None, None)),
        ("iter_0000500", (500, None, None)),
        ("stage2-checkpoint-500", (500, None, "stage2")),
    ],
)
def test_published_names_say_step_tokens_and_stage(name, expected):
    assert parse_revision(name) == Revision(name, *expected)


@pytest.mark.parametrize(
    "name",
    [
        "main",
        "",
        "v1.0",
        "refs/pr/3",
        "step",
        "step1000-tokens4B-unsharded",
        "tokens4B",
        "step-000060.bak",
        "step-5.tmp",
        "step" + "9" * 100_000,
        "checkpoint-best",
    ],
)
def test_names_that_are_no_steps_are_none(name):
    assert parse_revision(name) is None


def test_hub_branches_come_in_order_of_training_without_those_that_are_no_steps():
    listed = models.revisions("allenai/OLMo-1B-hf")
    assert steps(listed) == list(range(1000, 738_001, 1000))
    assert listed[0] == Revision("step1000-tokens4B", 1000, 4_000_000_000)


def test_the_public_name_is_the_function_also_after_its_module_is_imported():
    import mechhier.models.loading
    import mechhier.models.revision

    assert callable(mechhier.models.revisions)
    assert models.Revision is Revision


def test_stages_are_kept_apart_and_in_order(hub):
    hub.branches = OLMO_2
    assert [revision.name for revision in revisions("allenai/OLMo-2-1124-7B")] == [
        "step150-tokens1B",
        "stage1-step1000-tokens5B",  # and not step1000-tokens5B, which is the same checkpoint
        "stage1-step2000-tokens9B",
        "stage2-ingredient2-step1000-tokens5B",
        "stage2-ingredient2-step11931-tokens50B",
        "stage2-ingredient10-step1000-tokens5B",
    ]
    assert steps(revisions("allenai/OLMo-2-1124-7B", stage="stage1")) == [150, 1000, 2000]
    assert steps(revisions("allenai/OLMo-2-1124-7B", stage="stage2-ingredient2", n=2)) == [1000, 11_931]
    with pytest.raises(ValueError, match=r"no stage 'stage3'; it has stage1, stage2-ingredient2, stage2-ingredient10"):
        revisions("allenai/OLMo-2-1124-7B", stage="stage3")
    with pytest.raises(ValueError, match=r"choose one with stage=, of stage1"):
        revisions("allenai/OLMo-2-1124-7B", n=3)


def test_evenly_spaced_picks_are_the_nearest_steps():
    picked = steps(revisions("allenai/OLMo-1B-hf", n=5))
    assert picked == [1000, 185_000, 369_000, 554_000, 738_000]  # 1000 + 184,250 i, rounded to thousands


def test_log_spaced_picks_are_the_nearest_steps(hub):
    hub.branches = PYTHIA
    picked = steps(revisions("EleutherAI/pythia-70m", n=6, spacing="log"))
    targets = np.expm1(np.linspace(0, np.log1p(143_000), 6))
    available = np.array(sorted(steps(revisions("EleutherAI/pythia-70m"))))
    nearest = [available[np.abs(np.log1p(available) - np.log1p(target)).argmin()] for target in targets]
    assert picked == nearest
    assert picked[:2] == [0, 8]


@pytest.mark.parametrize("spacing", ["even", "log"])
@pytest.mark.parametrize("branches", [OLMO, PYTHIA])
def test_picks_are_distinct_ordered_and_keep_the_ends(hub, branches, spacing):
    hub.branches = branches
    everything = revisions("owner/name")
    for n in (2, 3, 17, 100, len(everything) - 1, len(everything), 10_000):
        picked = revisions("owner/name", n=n, spacing=spacing)
        assert len(picked) == min(n, len(everything))
        assert picked == sorted(set(picked), key=lambda revision: revision.step)
        assert (picked[0], picked[-1]) == (everything[0], everything[-1])


def test_a_local_mirror_lists_its_model_folders(tmp_path, hub):
    for name in ("step2000-tokens8B", "step1000-tokens4B", "step10000-tokens42B", "main"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "step3000-tokens12B").mkdir()  # a download that hardly began
    (tmp_path / "step3000-tokens12B" / "README.md").touch()
    assert steps(revisions(tmp_path)) == steps(revisions(str(tmp_path))) == [1000, 2000, 10_000]
    assert hub.times == 0


@pytest.mark.parametrize("pattern", ["checkpoint-{}", "step_{}", "step-{:06d}", "global_step{}", "iter_{:07d}"])
def test_a_trainings_output_lists_its_steps_and_nothing_else(pattern, tmp_path):
    for step in (5000, 60, 700, 0):
        (tmp_path / pattern.format(step)).mkdir()
        (tmp_path / pattern.format(step) / "config.json").write_text("{}")
    for stray in ("step-000060.bak", "runs", "best", "checkpoint-1", "step-000061.tmp"):
        (tmp_path / stray).mkdir()
    (tmp_path / "step-000060.bak" / "config.json").write_text("{}")
    (tmp_path / "step_61").write_text("a file")
    assert steps(revisions(tmp_path)) == [0, 60, 700, 5000]
    assert steps(revisions(tmp_path, n=2)) == [0, 5000]
    assert steps(revisions(tmp_path, n=3, spacing="log")) == [0, 60, 5000]


def test_a_folder_of_many_entries_and_odd_ones_is_listed_soon(tmp_path):
    (tmp_path / "step1").mkdir()
    (tmp_path / "step1" / "config.json").write_text("{}")
    for step in range(2, 20_000):
        (tmp_path / f"step{step}").touch()
    (tmp_path / "step20001").mkdir()
    (tmp_path / "step20001" / "config.json").mkdir()  # a folder of that name
    (tmp_path / "step20002").symlink_to("step20003")
    (tmp_path / "step20003").symlink_to("step20002")
    (tmp_path / "step20004").symlink_to(".")
    (tmp_path / "step20005").symlink_to("step1")
    started = time.process_time()
    assert steps(revisions(tmp_path)) == [1, 20_005]
    assert time.process_time() - started < 2


def test_a_mirror_or_a_repository_without_steps_is_an_error(tmp_path, hub):
    with pytest.raises(ModelNotFoundError, match="none at all"):
        revisions(tmp_path)
    hub.branches = ["main", "v2"]
    with pytest.raises(ModelNotFoundError, match=r"as step1000-tokens4B is.*it has main, v2"):
        revisions("openai-community/gpt2")


def test_what_a_node_with_network_listed_is_listed_without_network(hub):
    listed = revisions("allenai/OLMo-1B-hf")
    hub.error = OfflineModeIsEnabled("offline")
    age(hours=24 * 365)
    assert revisions("allenai/OLMo-1B-hf") == listed


@pytest.mark.parametrize("error", [OfflineModeIsEnabled("offline"), HTTPError("no route"), OSError("no route")])
def test_without_network_and_listing_the_error_has_the_command_that_fills_the_cache(hub, error, monkeypatch):
    hub.error = error
    with pytest.raises(HubUnreachableError, match="allenai/OLMo-1B-hf") as raised:
        revisions("allenai/OLMo-1B-hf")
    command = re.search(r'python -c "(.*)"', str(raised.value))[1]
    hub.error = None
    exec(command)
    hub.error = error
    assert len(revisions("allenai/OLMo-1B-hf")) == 738


def age(*, hours):
    """Make every cached listing older."""
    for path in Path(constants.HF_HOME).rglob("*.json"):
        listing = json.loads(path.read_text())
        listing["listed"] -= dt.timedelta(hours=hours).total_seconds()
        path.write_text(json.dumps(listing))


def test_a_listing_is_asked_for_once_a_day_or_on_demand(hub):
    revisions("allenai/OLMo-1B-hf")
    age(hours=23.9)
    revisions("allenai/OLMo-1B-hf")
    assert hub.times == 1
    age(hours=0.2)
    hub.branches = PYTHIA
    assert revisions("allenai/OLMo-1B-hf")[-1].step == 143_000
    assert hub.times == 2
    hub.branches = OLMO
    assert revisions("allenai/OLMo-1B-hf", refresh=True)[-1].step == 738_000
    assert hub.times == 3


def test_a_refresh_without_network_does_not_pretend(hub):
    revisions("allenai/OLMo-1B-hf")
    hub.error = OfflineModeIsEnabled("offline")
    with pytest.raises(HubUnreachableError):
        revisions("allenai/OLMo-1B-hf", refresh=True)


def test_models_of_two_owners_do_not_share_a_listing(hub):
    revisions("allenai/name")
    hub.branches = PYTHIA
    assert revisions("EleutherAI/name")[-1].step == 143_000


@pytest.mark.parametrize("content", ["", "{", "[]", '{"branches": 3, "listed": 0}', '{"branches": []}'])
def test_a_damaged_listing_is_replaced(hub, content, tmp_path):
    revisions("allenai/OLMo-1B-hf")
    (path,) = (tmp_path / "hf").rglob("*.json")
    path.write_text(content)
    assert len(revisions("allenai/OLMo-1B-hf")) == 738
    assert json.loads(path.read_text())["branches"] == sorted(OLMO)


def test_a_cache_that_cannot_be_written_is_no_obstacle(tmp_path):
    (tmp_path / "hf").write_text("a file where the folder should be")
    assert len(revisions("allenai/OLMo-1B-hf")) == 738


def test_a_name_that_the_hub_does_not_know_is_an_error(hub):
    response = SimpleNamespace(headers={}, request=None, status_code=404)
    hub.error = RepositoryNotFoundError("404", response=response)
    with pytest.raises(ModelNotFoundError, match=r"no folder 'allenai/OLMo-1B-fh'.*hf auth login"):
        revisions("allenai/OLMo-1B-fh")


@pytest.mark.parametrize("options", [{"n": 1}, {"n": 0}, {"n": 3, "spacing": "linear"}])
def test_options_that_mean_nothing_are_refused(options, hub):
    with pytest.raises(ValueError, match="must be") as raised:
        revisions("allenai/OLMo-1B-hf", **options)
    assert not isinstance(raised.value, ModelLoadError)
    assert hub.times == 0


def test_the_nearest_revisions_are_near_in_step_or_in_spelling():
    assert nearest_revisions("step1500-tokens6B", OLMO) == [
        "step2000-tokens8B",
        "step1000-tokens4B",
        "step3000-tokens13B",
    ]
    assert nearest_revisions("mian", ["step1", "main"])[0] == "main"
    assert nearest_revisions("stage1-step999", OLMO_2)[0] == "stage1-step1000-tokens5B"
    assert nearest_revisions("stage2-ingredient10-step999", OLMO_2) == ["stage2-ingredient10-step1000-tokens5B"]
