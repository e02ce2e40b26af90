"""A trained network as a folder to hand on: weights, what a sampler must know, a model card.

    FOLDER/model.safetensors     one average of the weights, by the names of the network
           config.json           network, path and prediction, shape, how samples are drawn
           null_condition.safetensors    what stands for no condition, where that is tensors
           README.md             how it was trained and how to load it, with a picture of images

Folders are local ones or repositories of the Hugging Face Hub (extra "hub"). Nothing is unpickled.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from fastcm import networks
from fastcm.evaluation.pictures import save_grid
from fastcm.runs import checkpoint, frozen, nested
from fastcm.runs.description import parameterization_from
from fastcm.runs.files import CheckpointError, read_state, replace_file, write_tensors
from fastcm.sampling import Sampler, append_weight
from fastcm.sampling.loops import Method

WEIGHTS, CONFIG, CARD, PICTURE = "model.safetensors", "config.json", "README.md", "samples.png"
NULL = "null_condition.safetensors"
FORMAT = 1
_STEPS: dict[Method, int] = {"multistep": 1, "flow-map": 1, "ode": 50}
_SHOWN = 36


def sampling_method(objective: str) -> Method:
    """How samples are drawn from what an objective of this name trains."""
    if objective in ("FlowMatching", "ConsistencyFlowMatching"):
        return "ode"
    return "flow-map" if objective in ("Shortcut", "MeanFlow") else "multistep"


def save_pretrained(
    run: str | Path,
    folder: str | Path,
    *,
    ema: int = 0,
    steps: int | None = None,
    method: Method | None = None,
    net: nn.Module | None = None,
) -> Path:
    """Write the newest checkpoint of a run as a folder for `from_pretrained`.

    Args:
        run: directory of a run.
        folder: created; files of these names in it are replaced.
        ema: which average of the weights; -1: the raw ones.
        steps: evaluations that the folder's sampler takes unless told otherwise; default 1, of the
            ODE 50.
        method: of the sampler; default what suits the objective.
        net: of a run that leaves out its frozen parameters: a network that has them, which takes
            the others from the run. The folder is then read with a `net`, too.

    Returns:
        The folder. Of networks that describe themselves the card shows samples, if images.

    Raises:
        FileNotFoundError, CheckpointError: no intact run there.
        ValueError: no such average, steps < 1; `folder` is that of a run; frozen parameters that
            are missing, or not those of the run.
    """
    out = Path(folder)
    if (out / checkpoint.CHECKPOINTS).exists():
        raise ValueError(f"{out} is the directory of a run, choose another")
    group = "model" if ema == -1 else f"average_{ema}"
    only, requires = {group, checkpoint.NULL}, checkpoint.RUN_STATE
    found, _ = checkpoint.load_newest(Path(run), only=only, requires=requires)
    state = found.state
    if group not in found.groups:
        raise ValueError(f"ema must be in [-1, {state['num_averages']}) for {run}, got {ema}")
    method = method or sampling_method(state["config"]["objective"]["type"])
    config = {
        "library": "fastcm",
        "format": FORMAT,
        **{name: state[name] for name in ("network", "parameterization", "shape")},
        "null_condition": state["null_condition"],
        "method": method,
        "steps": _STEPS[method] if steps is None else steps,
        "average": None if ema == -1 else state["config"]["averages"][ema],
        "step": state["step"],
        "training": state["config"],
    }
    if config["steps"] < 1:
        raise ValueError(f"steps must be >= 1, got {steps}")
    weights = found.groups[group]
    if net is None:
        frozen.check_whole(found)
    else:
        frozen.fill(net, found, group)
        weights = checkpoint.weights_of(net)
        config["network"] = None  # it may have layers that its description does not know
    out.mkdir(parents=True, exist_ok=True)
    write_tensors(out / WEIGHTS, weights)
    null = found.groups.get(checkpoint.NULL)
    if null is not None:
        write_tensors(out / NULL, null)
    replace_file(out / CONFIG, json.dumps(config, indent=1).encode())
    picture = None if config["network"] is None else _picture(from_pretrained(out), out)
    replace_file(out / CARD, _card(config, weights, picture).encode())
    return out


def from_pretrained(
    folder_or_repo: str | Path,
    *,
    net: nn.Module | None = None,
    revision: str | None = None,
    **options: Any,
) -> Sampler:
    """The sampler of a folder that `save_pretrained` wrote.

    Args:
        folder_or_repo: the folder, or the name of a repository on the Hugging Face Hub.
        net: a network of the same architecture, if it is not one of `fastcm.networks`.
        revision: of the repository: a branch, tag or commit.
        **options: of `Sampler`, in place of what the folder says: device, steps, method, ...

    Raises:
        FileNotFoundError: no such folder, or a file is missing in it.
        ImportError: a repository without huggingface_hub: ``pip install "fastcm[hub]"``.
        ValueError: the folder does not describe its network and no `net` is given; a file of
            another form, weights of another network.
    """
    folder = _local(folder_or_repo, revision)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} has no {name}: `fastcm export RUN --to FOLDER` writes such a folder"
            )
    config = read_state(folder / CONFIG)
    if config.get("library") != "fastcm" or config.get("format") != FORMAT:
        raise ValueError(
            f"{folder / CONFIG} is of {config.get('library')!r}, format {config.get('format')!r}; "
            f"this version reads 'fastcm', format {FORMAT}"
        )
    if net is None:
        if config["network"] is None:
            raise ValueError(
                f"{folder} does not describe its network: give from_pretrained(..., net=...) one "
                "of the same architecture"
            )
        net = networks.build(config["network"])
    weights = _read(folder / WEIGHTS)
    checkpoint.check_tensors(f"{folder / WEIGHTS}", weights, checkpoint.weights_of(net))
    checkpoint.load_weights(net, weights)
    known = {name: config[name] for name in ("shape", "method", "steps")}
    tensors = _read(folder / NULL) if (folder / NULL).is_file() else {}
    known["null_condition"] = nested.unflatten(config["null_condition"], tensors)
    if options.get("times") is not None:
        del known["steps"]
    p = parameterization_from(config["parameterization"])
    return Sampler(net, p, **{**known, **options})


def _read(file: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(file, device="cpu")
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{file} is not readable: {error}") from error


def push_to_hub(folder: str | Path, repo: str, *, private: bool | None = None) -> str:
    """Upload a folder of `save_pretrained` to the Hugging Face Hub, as whoever is logged in.

    Args:
        folder: the folder.
        repo: "owner/name", created if there is none.
        private: of a new repository; None: what the account has as its default.

    Returns:
        The address of the commit.

    Raises:
        FileNotFoundError: it is no such folder.
        ImportError: huggingface_hub is missing.
    """
    for name in (CONFIG, WEIGHTS, CARD):
        if not (Path(folder) / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}, it is not of save_pretrained")
    hub = _hub()
    api = hub.HfApi(library_name="fastcm")
    api.create_repo(repo, private=private, exist_ok=True)
    files = [CONFIG, WEIGHTS, NULL, CARD, PICTURE]
    return str(api.upload_folder(repo_id=repo, folder_path=str(folder), allow_patterns=files))


def _local(folder_or_repo: str | Path, revision: str | None) -> Path:
    folder = Path(folder_or_repo)
    if folder.exists():
        if revision is not None:
            raise ValueError(f"revision is of a repository, and {folder} is a local folder")
        return folder
    name = str(folder_or_repo)
    if isinstance(folder_or_repo, Path) or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"no such folder: {folder_or_repo}")
    files = [CONFIG, WEIGHTS, NULL]
    return Path(_hub().snapshot_download(name, revision=revision, allow_patterns=files))


def _hub() -> Any:
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise ImportError('huggingface_hub is missing: pip install "fastcm[hub]"') from error


def _picture(sampler: Sampler, folder: Path) -> str | None:
    """Samples of a network of images, of all classes in turn; the name of the file."""
    shape = sampler.shape
    if shape is None or len(shape) != 3 or shape[0] not in (1, 3, 4):
        return None
    known = getattr(sampler.net, "description", {})
    classes = known.get("num_classes")
    cond = None if classes is None else torch.arange(_SHOWN) % classes
    if known.get("guided"):
        cond = append_weight(cond, 1.0, _SHOWN)
    save_grid(sampler(_SHOWN, cond=cond), folder / PICTURE)
    return PICTURE


def _card(config: Mapping[str, Any], weights: Mapping[str, Tensor], picture: str | None) -> str:
    """The model card: what is known of the run, and nothing else."""
    training = config["training"]
    objective = dict(training["objective"])
    name = objective.pop("type")
    network = config["network"] or training["network"]
    elements = sum(w.numel() for w in weights.values())
    rows = {
        "objective": f"`{name}`",
        "network": f"`{json.dumps(network)}`",
        "weights": f"{elements:,} numbers, average `{json.dumps(config['average'])}`",
        "sample": f"`{config['shape']}`",
        "path": f"`{json.dumps(config['parameterization'])}`",
        "trained": f"{config['step']:,} steps of {training['batch_size']} rows, "
        f"{training['precision']}, seed {training['seed']}",
        "data": f"`{json.dumps(training['data'])}`",
        "sampler": f"{config['method']}, {config['steps']} steps",
    }
    given = "" if config["network"] is not None else ", net=net"
    classes, cond = (config["network"] or {}).get("num_classes"), ""
    if classes is not None:
        cond = f", cond=torch.arange(16) % {classes}"
        if config["network"].get("guided"):
            cond = f", cond=fastcm.sampling.append_weight(torch.arange(16) % {classes}, 1.0)"
    table = "\n".join(f"| {what} | {value} |" for what, value in rows.items())
    image = "" if picture is None else f"\n![samples]({picture})\n"
    more = json.dumps(objective, indent=1)
    return f"""---
library_name: fastcm
tags:
- few-step-generation
- {name}
---
# {name}, {config["steps"]} step{"s" if config["steps"] > 1 else ""}
{image}
```python
import torch
import fastcm

sampler = fastcm.from_pretrained("."{given})  # this folder, or its repository
x = sampler(16, seed=0{cond})
```

`{WEIGHTS}` holds the weights by the names of the network: `safetensors.torch.load_file` and
`load_state_dict` take them, too.

| | |
|---|---|
{table}

The objective in full:

```json
{more}
```
"""
