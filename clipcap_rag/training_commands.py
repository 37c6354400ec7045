"""The commands that train: `clipcap-rag train` and `clipcap-rag sweep`."""

from argparse import ArgumentParser, Namespace
from typing import Any

from clipcap_rag.config import ModelConfig, TrainConfig
from clipcap_rag.errors import InputError
from clipcap_rag.flags import INDEX_HELP, add_compute, add_config, add_json, add_out, given_fields
from clipcap_rag.output import DONE, print_result
from clipcap_rag.presets import PRESETS, configure, description
from clipcap_rag.progress import say


def _add_data(parser: ArgumentParser, start: bool) -> None:
    parser.add_argument("--features", required=True, metavar="DIR", help="feature set of the training photos")
    parser.add_argument("--index", help=f"caption index to retrieve from: {INDEX_HELP}")
    text = "GPT-2-family model to start from: a folder or a hub id such as gpt2"
    parser.add_argument("--language-model", required=not start, metavar="MODEL", help=text)
    if start:
        text = "captioner to go on from, in place of --language-model: a run, a checkpoint, starter or hf-hub:ORG/NAME"
        parser.add_argument("--start", metavar="CAPTIONER", help=text)


def _add_settings(parser: ArgumentParser) -> None:
    add_config(parser, ModelConfig, "model", omit=("clip_dim", "lm_dim"))
    add_config(parser, TrainConfig, "training")
    add_compute(parser)


def _settings(given: Namespace) -> dict[str, Any]:
    return given_fields(ModelConfig, given) | given_fields(TrainConfig, given)


def train_flags(parser: ArgumentParser) -> None:
    _add_data(parser, start=True)
    text = "caption index whose captions are trained on first, as if they were photos"
    parser.add_argument("--text-index", metavar="INDEX", help=text)
    text = "feature set to validate on (default: a part of --features)"
    parser.add_argument("--validation-features", metavar="DIR", help=text)
    add_out(parser)
    text = "recipe whose settings are the defaults: ours with retrieval, or one of ClipCap's two (default: rag)"
    parser.add_argument("--preset", choices=tuple(PRESETS), default="rag", help=text)
    _add_settings(parser)


def train(given: Namespace) -> int:
    """Train a captioner; a stopped run continues when the same command is run again."""
    model_config, train_config = configure(given.preset, **_settings(given))
    shape = given_fields(ModelConfig, given)
    if given.start and shape:
        raise InputError(f"--start has its own {next(iter(shape))}; leave that out, or start from --language-model")
    say(description(given.preset, _settings(given)))
    from clipcap_rag.training import train as run_training

    out = run_training(
        given.features,
        given.index,
        given.language_model,
        given.out,
        start=given.start,
        model_config=model_config,
        train_config=train_config,
        text_index=given.text_index,
        validation_features=given.validation_features,
        device=given.device,
        dtype=given.dtype,
        overwrite=given.overwrite,
    )
    _tell_of_photos(given.index, given.features)
    print(f"{out}: trained; caption photos with: clipcap-rag caption PHOTO --model {out}")
    return DONE


def _tell_of_photos(index: str | None, features: str) -> None:
    """Says how the captions of an index get their photos, if they have them not and they are those trained on."""
    from clipcap_rag.caption_index import CaptionIndex
    from clipcap_rag.features import FeatureSet

    if index is None or (opened := CaptionIndex.open(index, "cpu")).files.images is not None:
        return
    if len(opened.rows_of_images(set(FeatureSet.open(features).image_ids))):
        say(
            f"captions get better with photos: clipcap-rag index add-images {index} --features {features}, "
            "best with features of extract --trunk"
        )


def sweep_flags(parser: ArgumentParser) -> None:
    text = "a model or training setting and its values, such as prefix_length=1,5,10,20,40"
    parser.add_argument("setting", metavar="SETTING=VALUE,VALUE", help=text)
    _add_data(parser, start=False)
    text = "feature set to validate and to evaluate on"
    parser.add_argument("--validation-features", required=True, metavar="DIR", help=text)
    text = "folder of the runs, their evaluations, sweep.json and sweep.png; what stands there is continued"
    parser.add_argument("--out", required=True, metavar="DIR", help=text)
    text = "recipe to train with each value; may be repeated (default: clipcap-mlp and clipcap-transformer)"
    parser.add_argument("--preset", action="append", choices=tuple(PRESETS), help=text)
    add_json(parser, "print the result as JSON instead of a table")
    _add_settings(parser)


def sweep(given: Namespace) -> int:
    """Train with each of several values of one setting, evaluate each run, and draw the curves.

    A stopped sweep continues when the same command is run again, and more values or presets add to it.
    """
    from clipcap_rag.sweep import setting_values, table
    from clipcap_rag.sweep import sweep as run_sweep

    setting, values = setting_values(given.setting)
    result = run_sweep(
        given.features,
        given.validation_features,
        given.index,
        given.language_model,
        given.out,
        setting=setting,
        values=values,
        presets=given.preset or ("clipcap-mlp", "clipcap-transformer"),
        settings=_settings(given),
        device=given.device,
        dtype=given.dtype,
    )
    print_result(result, given.json, table)
    return DONE
