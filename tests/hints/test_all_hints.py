"""The table of hints.

Whatever the package tells its users to do was done once, or says here why not.
"""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

from hints.hint_rows import FOLLOWED
from hints.sites import Site, all_sites, errors_without

from mlflow_safeflavor.artifact.plain_files import FETCH_AGAIN

TESTS = Path(__file__).parents[1]

_WRAPPERS = (
    "unit/module/test_attributes.py::test_wrappers_are_named_with_the_line_that_takes_them_off"
)
_WHEELS = "integration/test_dockerfile.py::test_the_hint_of_a_wheel_that_has_moved"

_PINS = "integration/test_used.py::test_lines_of_the_users_own_stay_and_what_they_lack_is_told"
_LACKING = (
    "safeflavor: the rehearsal used what the given requirements do not bring, so that the model "
    "may not load where they are installed, or answer otherwise. To add: %s"
)

_HABITS = "integration/test_mlflow_habits.py::test_"

_SAVED = "integration/test_log_saved.py::test_"

ELSEWHERE = {
    Site("save/again", "The upload of the model broke off",
         'log_model("…", model_id="…"…) uploads what is missing'):
        f"{_SAVED}an_upload_that_broke_off_goes_on_with_what_is_missing",
    Site("save/again", "This is no upload that can go on", "leave model_id out"):
        f"{_SAVED}it_does_not_go_on_with_another_model",
    Site("save/save", "A saved model is logged as it was saved",
         "leave them out, or log the model itself"):
        f"{_SAVED}options_of_a_save_come_too_late",
    Site("module/devices", "There is no such device here",
         "unset MLFLOW_DEFAULT_PREDICTION_DEVICE"):
        f"{_HABITS}mlflows_variable_counts_for_both_ways_to_load",
    Site("load/reload",
         "A loaded model is pickled as the folder it came from, which does not hold it",
         "load the model in each process: mlflow_safeflavor.load_model(uri); or pass dst_path=…, "
         "where what is downloaded stays"):
        f"{_HABITS}a_model_whose_folder_changed_is_not_pickled_or_loaded_again",
    Site("artifact/plain_files", "A file of the artifact is no plain file",
         "where mlflow.models.update_model_requirements or add_libraries_to_model changed it, log "
         "the model again with extra_pip_requirements=[…], which are pinned and recorded; else "
         "fetch the artifact again"):
        "integration/test_edits.py::test_edited_requirements_name_the_call",
    Site("artifact/plain_files", "A file of the artifact is no plain file",
         "where mlflow.models.set_signature changed it, log the model again with signature=… or "
         "params=…, which are checked and recorded; else fetch the artifact again"):
        "integration/test_edits.py::test_a_default_that_the_call_was_meant_for_is_given_at_save",
    Site("mlflow_compat", "A model is logged under one name", "leave artifact_path out"):
        f"{_HABITS}artifact_path_is_what_name_was_called",
    Site("mlflow_compat", "Before MLflow 3 a model is logged to a place below its run",
         'pass name="model"'):
        f"{_HABITS}before_mlflow_3_a_name_may_not_be_left_out",
    Site("load/container", "This image was made to serve on a GPU, and there is none here",
         "docker run --gpus all …, on a host with NVIDIA's driver and container toolkit; -e "
         "MLFLOW_SAFEFLAVOR_DEVICE=cpu serves on the CPU all the same"):
        "integration/test_dockerfile.py::test_a_container_for_a_gpu_says_what_it_is_missing",
    Site("checkpoints/adapters", "An adapter cannot be merged into its base model",
         "…model = peft.PeftModel.from_pretrained(base, …).merge_and_unload(), where base is the "
         "module it was trained on; then save_model(model, tokenizer=…)"):
        "integration/test_adapters.py::test_a_base_that_is_not_here_is_named_with_what_to_do",
    Site("environment/hashes", "The wheel that was installed when the model was saved is not "
                               "there any more",
         "name the folder that holds it: UV_FIND_LINKS=FOLDER; or save the model again where "
         "another build is installed"): _WHEELS,
    Site("graph/openvino_engine", "OpenVINO is not installed", "pip install "
                                                               "'mlflow-safeflavor[openvino]'"):
        "integration/test_openvino.py::test_where_it_is_not_installed",
    Site("graph/openvino_engine", "This CPU has no arithmetic for the dtype, so that OpenVINO "
                                  "would silently take another",
         "leave dtype out"): "integration/test_openvino.py::test_bfloat16_where_the_cpu_has_it",
    Site("graph/openvino_engine", "OpenVINO does not take the graph of the model",
         "leave the engine out, or `pip install --upgrade openvino`"):
        "integration/test_openvino.py::test_what_it_does_not_know",
    Site("load/engine_choice", "The model asks for OpenVINO, whose kernels trust the graph's "
                               "arguments",
         'pass model_config={"engine": "openvino"} if you trust who saved it; else {"engine": '
         '"onnx"}'):
        "integration/test_openvino.py::test_it_runs_only_where_somebody_wants_it",
    Site("load/image", "The model was not saved to be served by OpenVINO, which is not among its "
                       "pins",
         'leave it out, or save the model with model_config={"engine": "openvino"}'):
        "integration/test_openvino.py::test_images_of_what_was_saved_for_it",
    Site("load/image", "A graph is served on a CPU", 'target="cpu", or engine="module"'):
        "integration/test_graph.py::test_an_image_has_the_pins_of_what_it_serves_with",
    Site("load/image", "A graph is served on a "
                       "CPU", 'target="cpu"'): "integration/test_graph.py::test_a_graph_alone_says_what_it_takes",
    Site("module/device_map", "device_map needs accelerate", "pip install "
                                                            "'mlflow-safeflavor[accelerate]'"):
        "integration/test_device_map.py::test_without_accelerate_the_extra_is_named",
    Site("module/wrappers", "The module's forward is wrapped by accelerate for mixed precision, as "
         "transformers' Trainer does, "
         "too", "{model} = accelerate.utils.extract_model_from_parallel({model}, "
                "keep_fp32_wrapper=False)"): _WRAPPERS,
    Site("module/wrappers", "A part of the module is wrapped by training",
         "{model} = {model}._orig_mod for torch.compile, {model}.module for the others"): _WRAPPERS,
    Site("module/wrappers", "The module was compiled in place, and compiled code cannot be saved",
         "{model}._compiled_call_impl = None"): _WRAPPERS,
    Site("module/wrappers", "…, and no constructor gives it back", "…"): _WRAPPERS,
    Site("save/pinning", "A clean process of this Python runs other versions than this process, "
         "which is what the pins would "
         "name", "start Python without PYTHONPATH and changes of sys.path, or install the wanted "
         "versions: `pip install …`"): _PINS,
    Site("save/pinning", _LACKING, _LACKING): _PINS,
}  # fmt: skip
"""Followed by other tests than those of this folder."""

CANNOT = {
    Site("module/wrappers", "The module's weights are spread over processes",
         "gather them with torch.distributed.checkpoint.state_dict.get_model_state_dict(model, "
         "options="
         "StateDictOptions(full_state_dict=True)) and load them into a plain module of the same "
         "class"):
        "needs a group of processes; the names it uses are those of torch's documentation",
    Site("environment/differences", "_HINT",
         "install requirements.txt of the model (`pip install -r requirements.txt`) under the "
         "Python of its python_env.yaml, or let MLflow do both with --env-manager uv"):
        "installs gigabytes: tests/system/docker and `make matrix` install these files",
    Site("environment/differences", "The graph cannot answer this, and what its module needs is "
                                    "not installed",
         "install requirements.txt of the model, and not only requirements-onnx.txt; an image of "
         "`mlflow-safeflavor dockerfile --engine module` has it all"):
        "installs gigabytes: tests/system/docker and `make matrix` install these files",
}  # fmt: skip
"""Cannot be followed within a test, and why."""

FORWARDED = {
    Site(
        "tasks/inputs/caps", "require", "…"
    ): "what its callers pass as instead=, each with a row of its own",
    Site(
        "checkpoints/from_pretrained", "Not an option of from_pretrained", "…"
    ): "a hint of _REFUSED",
    Site("tasks/text", "require_pieces", "…"): "instead= of those that call require_few_windows",
    Site("checkpoints/damage", "…", "…"): "the error, as a warning",
    Site("errors", "…", "…"): "an error that was raised, with another hint in front",
    Site(
        "checkpoints/given", "Methods of your own in a … would be lost", "…"
    ): "_HINT of sentences, _HINT_OWN of pipelines",
    Site("load/saved", "…", "…"): "hint_of of plain_files",
    Site("module/wrappers", "…", "…"): "a hint of _REFUSED",
    Site(
        "environment/differences", "%s", "%s"
    ): "the table of differences, with the hint of EnvironmentMismatchError",
}
"""Hand on what has a row elsewhere."""

TELLS = {
    (
        "save/autolog",
        "autolog did not log the model %r of step %s, or its metrics: %s",
    ),
    ("save/pinning", "safeflavor: pinned because the rehearsal used it, and what it requires: %s"),
    (
        "save/pinning",
        "safeflavor: not rehearsed, so the pins are those of the model's classes, hooks and "
        "processor; what else its code imports or reads is not among them unless "
        "extra_pip_requirements says so",
    ),
    ("environment/record", "Not installed and so not pinned, although something requires it: %s"),
    ("environment/record", "Installed versions contradict what is required: %s"),
    ("environment/closure", "Metadata of %s holds a requirement nobody can read: %s"),
    ("artifact/host_cache", "safeflavor: nothing is kept on this host: %s"),
    ("spark", "safeflavor: %d rows in %.2f s"),
    ("graph/packed_weights", "safeflavor: packed weights are not shared: %s"),
    ("load/pyfunc", "safeflavor: %s"),
    ("load/pyfunc", "safeflavor: %s failed"),
    ("server/answer", "safeflavor: request %s cannot be read"),
    ("predict/unfailing", "safeflavor: %s failed, and answers go on"),
    (
        "environment/lines",
        "%s is not installed here, so it stays as written and is not pinned any further",
    ),
    ("module/comparison", "safeflavor: not saved, because a forward makes it anew: %s"),
    ("artifact/weights_files", "safeflavor: no private copy of %s: %s"),
}
"""Lines of the log that tell what was done, and nothing to do."""

BARE = {
    ("arguments", "… cannot be called like this"): "Python says which argument is missing",
    ("checkpoints/recipe", "There is no model of tokens"): "of that config there is none",
    ("cli", "The page cannot be written"): "the system says why",
    ("module/embedding", "A layer of the model is unknown"): "the error inside says what is known",
    ("verify/endpoint", "The rows cannot be sent as JSON"): "the error inside names the value",
    ("checkpoints/hub", "The hub does not say which commit this is"): "a hub that is none",
    ("tasks/inputs/processor", "The processor cannot be written as JSON"): "its class says why",
    ("tasks/inputs/processor", "The processor cannot be built again"): "its class says why",
    (
        "tasks/inputs/processor",
        "The processor does not take a single image or sound",
    ): "its class says why",
    ("environment/conda", "conda_env cannot be read"): "the system says why",
    (
        "module/build",
        "The class does not make a module",
    ): "only a changed artifact has such a class",
    ("tasks/hooks", "preprocess refuses a row"): "the user's own words",
    ("tasks/processed", "The processor refuses a value"): "its class says why",
    ("tasks/raw", "forward refused the arrays"): "forward says why",
    ("tasks/text_generation", "The chat template refuses a chat"): "the template's own words",
    (
        "tasks/inputs/tokenizer",
        "The tokenizer cannot be built again by transformers",
    ): "its class says why",
    ("tasks/inputs/tokenizer", "The tokenizer cannot be written as JSON"): "its class says why",
    ("tasks/inputs/probes", "The tokenizer does not take plain texts"): "its class says why",
}
"""Errors that say neither what is wanted nor what to do, and why that is enough."""


def rows() -> dict[Site, str]:
    for path in Path(__file__).parent.glob("test_hints_of_*.py"):
        importlib.import_module(path.stem)
    return FOLLOWED


def test_every_hint_was_followed():
    known = {*rows(), *ELSEWHERE, *CANNOT, *FORWARDED}
    # One hint for all damage: test_a_damaged_artifact follows it.
    open_ = [site for site in all_sites() if site not in known and site.hint != FETCH_AGAIN]
    assert [str(site) for site in open_ if site[:2] not in TELLS] == []


def test_every_row_is_of_a_hint_that_is_given():
    sites = all_sites()
    assert [
        str(site) for site in (*rows(), *ELSEWHERE, *CANNOT, *FORWARDED) if site not in sites
    ] == []
    assert TELLS - {site[:2] for site in sites} == set()


def test_tests_of_other_files_are_there():
    for name in set(ELSEWHERE.values()):
        file, _, function = name.partition("::")
        defined = [
            node.name
            for node in ast.parse((TESTS / file).read_text()).body
            if isinstance(node, ast.FunctionDef)
        ]
        assert function in defined


def test_every_error_says_what_is_wanted_or_what_to_do():
    bare = {(module, what) for module, what, wanted in errors_without() if not wanted}
    assert bare == set(BARE)
