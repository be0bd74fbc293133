"""Makes an audit: from a finished run to the files of the audit."""

import dataclasses
import json
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict
from scipy.stats import binom

from ieg_jax import cli, files, inference, methods
from ieg_jax.audit import cleaned, final, measures, predicted, retrained, sample
from ieg_jax.audit import page as audit_page
from ieg_jax.audit import quality as label_quality
from ieg_jax.audit.files import (
    BEGUN,
    CLASSIFIER,
    CLEANED,
    CLEANED_DATA,
    PAGE,
    SUMMARY,
    write_cleanlab,
    write_tables,
)
from ieg_jax.audit.options import Options
from ieg_jax.audit.quality import Quality
from ieg_jax.data import splits
from ieg_jax.data.load import Data, fold_of, load_data
from ieg_jax.data.sources import image_files
from ieg_jax.data.splits import Split
from ieg_jax.errors import StorageError, UserError, check_choice, first_line
from ieg_jax.inference import Trained, plain
from ieg_jax.train.loop import train_and_evaluate

MEMORISED_GAP = 0.25  # between accuracies on trusted examples that were trained with and on those that were held out
LATER = ("force", "retrain")  # options that do not make an audit another one
BEGIN_SECONDS = 2.0  # until another process that begins the same audit has said so


def audit(workdir: str, out: str, options: Options | None = None) -> dict[str, Any]:
    """Audits the labels that a run was trained on.

    Args:
      workdir: of the run.
      out: folder; new, empty, or of an audit that was interrupted.
      options: None = the usual ones.

    Returns:
      The contents of summary.json.

    Raises:
      UserError: where the options are not allowed, and where the run, its data or the folder cannot be used.
      StorageError: where something cannot be written.
    """
    options = options or Options()
    folder, workdir, trained, data, finished = _opened(workdir, out, options)
    try:
        summary = _write_all(folder, workdir, trained, data, options) if finished is None else finished
        if options.retrain and "retrained" not in summary:
            if summary["cleaned"] is None:
                raise UserError("--retrain: there are alarms, so nothing was cleaned that could be trained on")
            summary["retrained"] = _retrain(folder, workdir, trained, data)
            files.write_json(folder / SUMMARY, summary)
        return summary
    except files.storage_errors() as error:
        raise StorageError(f"{folder} cannot be written: {first_line(error)}") from error


def predict_part(workdir: str, out: str, part: str, options: Options | None = None) -> str:
    """Makes a part of the predictions of an audit, and nothing else of it; `audit` then finds them.

    The parts may be made at the same time, on machines that share the folder; each goes on where it was interrupted.

    Args:
      workdir: of the run.
      out: the folder of the audit, one for all parts.
      part: "i/n", the i-th of n parts, from 1.
      options: of the audit.

    Returns:
      What was done, in words.

    Raises:
      UserError, StorageError: as `audit`; and for another `part`.
    """
    options, number = options or Options(), predicted.parse_part(part)
    folder, workdir, trained, data, finished = _opened(workdir, out, options, several=True)
    if finished is not None:
        return f"{folder} holds the finished audit: there is nothing left to predict"
    _, predict = _judges(workdir, trained, options)
    try:
        rows = predicted.share(folder, predict, data.train, options.views, number)
    except files.storage_errors() as error:
        raise StorageError(f"{folder} cannot be written: {first_line(error)}") from error
    return (
        f"part {part}: {rows.stop - rows.start:,} of {len(data.train):,} examples are predicted; when all parts are, "
        f"give the command without --part"
    )


def _opened(
    workdir: str, out: str, options: Options, several: bool = False
) -> tuple[epath.Path, str, Trained, Data, dict[str, Any] | None]:
    """Checks what an audit is made of, and begins it; see `audit`.

    Args:
      workdir: of the run.
      out: the folder of the audit.
      options: its options.
      several: whether other processes may begin it at the same time.

    Returns:
      The folder of the audit, that of the run, the run's network and its data; and the summary of an audit that is
      finished, else None.
    """
    if not 0 <= options.threshold <= 1:
        raise UserError(f"--threshold={options.threshold}: expected a probability, from 0 to 1")
    if options.folds == 1:
        raise UserError("--folds=1: expected 0 (none) or at least 2")
    if options.fold_method:
        check_choice("--fold_method", options.fold_method, methods.REGISTRY)
    workdir = str(epath.Path(workdir).expanduser())
    trained = inference.load(workdir, options.checkpoint)
    folder = epath.Path(out).expanduser()
    if not (epath.Path(workdir) / "data.json").exists():
        raise UserError(f"{workdir} has no data.json: an audit needs the work folder of a run, not exported weights")
    data = load_data(trained.config)
    _check_data(workdir, data)
    if options.retrain and data.train.is_features and data.features is None:
        raise UserError("--retrain is for images; of features an audit trains a final classifier as it is")
    begun = {
        "workdir": _absolute(workdir),
        "step": trained.step,
        "options": {name: value for name, value in dataclasses.asdict(options).items() if name not in LATER},
        "data": data.fingerprint(),
        "evidence": sample.fingerprint(data.held_out, options.marks),
        "base": _base(trained.config.data),
        "arrays": _absolute(trained.config.data.train) if _is_arrays(trained.config.data) else "",
        "class_names": splits.distinct(trained.class_names),
    }
    return folder, workdir, trained, data, _begin(folder, begun, several)


def in_words(summary: dict[str, Any], out: str) -> str:
    """What the command says of an audit in the folder `out`, from the contents of its summary.json."""
    low, high = summary["noise_interval"]
    lines = [
        f"{summary['examples']:,} labels, {summary['noise_rate']:.1%} of them wrong (95 %: {low:.1%} to {high:.1%}), "
        f"by {summary['judged_by']}; open {epath.Path(out) / PAGE}",
        audit_page.calibration_text(summary),
    ]
    if "final" in summary:
        lines += [final.table(summary["final"]["comparison"]), f"final classifier: {summary['final']['classifier']}"]
    if "retrained" in summary:
        lines += [final.table(summary["retrained"]["comparison"]), f"the best: {summary['retrained']['best']}"]
    lines += [f"ALARM: {alarm}" for alarm in summary["alarms"]]
    if summary["alarms"] and summary["cleaned"] is None:
        lines.append(
            "cleaned.csv is not written, as the estimates are unreliable; ieg_jax.clean --force writes it all the same"
        )
    return "\n".join(lines)


def _write_all(folder: epath.Path, workdir: str, trained: Trained, data: Data, options: Options) -> dict[str, Any]:
    """Predicts, estimates and writes all files of the audit; returns the contents of summary.json."""
    networks, predict = _judges(workdir, trained, options)
    train = data.train
    names = splits.distinct(trained.class_names)
    answers = sample.read(options.marks, train.ids, names) if options.marks else None
    probabilities, disagreement = predicted.training_set(folder, predict, train, options.views, trained.num_classes)
    held_out = None if data.held_out is None else predict(data.held_out)
    out_of_fold, pooled, held_out_pooled = None, probabilities, held_out
    if options.folds:
        out_of_fold, held_out_of_fold = _out_of_fold(folder, trained, data, options)
        pooled = measures.pooled([probabilities, out_of_fold])
        if held_out is not None:
            held_out_pooled = measures.pooled([held_out, held_out_of_fold])
    if answers is not None:
        evidence = sample.as_evidence(answers, train.labels, pooled)
    elif data.held_out is not None:
        evidence = (held_out_pooled, data.held_out.labels, data.held_out.given_labels)
    else:
        evidence = ()
    quality = label_quality.estimate(pooled, train.labels, *evidence, class_names=names)
    found = None
    if not options.folds and train.is_features and final.possible(train):
        found = _final(trained, data, probabilities, quality, answers)
        final.save(found, folder / CLASSIFIER)
    by = f"the mean of {len(networks)} networks over training"
    if found is not None and found.name != final.NETWORK:
        quality, out_of_fold, alarms = found.quality, found.out_of_fold, list(found.quality.alarms)
        by = f"out-of-fold predictions by the final classifier, {found.name}"
    else:
        alarms = list(quality.alarms)
        if data.features is None:  # among the many features of a backbone a few examples are always told apart
            alarms += _alarm_trusted(data, inference.predictor(trained))
        if len(networks) == 1:
            by = f"the network of step {trained.step:,}"
        if options.folds:
            by += f", and out-of-fold predictions by {options.folds} networks"

    columns = _columns(train, names, quality, disagreement, _averages(workdir, train.ids), out_of_fold)
    write_tables(folder, columns, probabilities, names, options.spreadsheet)
    write_cleanlab(folder, train.labels, probabilities if out_of_fold is None else out_of_fold)
    counts = None
    if options.force or not alarms:
        counts = cleaned.write(folder, folder / CLEANED, options.threshold, options.below)
        if _is_arrays(trained.config.data):
            copy = (folder / CLEANED_DATA).with_suffix(epath.Path(trained.config.data.train).suffix.lower())
            cleaned.write(folder, copy, options.threshold, options.below)
    summary = _summary(trained, train, quality, alarms, options, counts) | {"judged_by": by}
    if found is not None:
        summary["final"] = final.as_json(found)
    if answers is not None:
        summary["sample"] = sample.report(answers, quality)
    audit_page.write_page(folder, trained, data, quality, disagreement, columns, summary, options.thumbnails)
    files.write_json(folder / SUMMARY, summary)
    return summary


def _judges(workdir: str, trained: Trained, options: Options) -> tuple[list[Trained], predicted.Predict]:
    """The networks that judge the labels, and what predicts by all of them."""
    networks = inference.over_training(workdir, trained) if options.checkpoint is None else [trained]
    return networks, measures.mean_over(inference.predictor(trained), inference.predictor_of_all(networks))


def _final(
    trained: Trained,
    data: Data,
    probabilities: np.ndarray,
    quality: Quality,
    answers: sample.Answers | None,
) -> final.Final:
    """The final classifier of features, see `audit.final`; a network that has seen views of images is hard to beat."""

    def examples(split: Split, predictions: np.ndarray) -> final.Examples:
        return final.Examples(plain.flat(split), split.labels, predictions)

    predict = inference.predictor(trained)  # the comparison is with the network of the run, not with a mean of several
    task = final.Task(
        noisy=examples(data.train, probabilities),
        trusted=examples(data.trusted, predict(data.trusted)),
        held_out=None if data.held_out is None else examples(data.held_out, predict(data.held_out)),
        held_out_given=None if data.held_out is None else data.held_out.given_labels,
        seed=trained.config.seed,
        class_names=splits.distinct(trained.class_names),
        answers=answers,
        balanced=trained.config.class_weight == "balanced",
    )
    return final.fit(task, quality, trained.config.method.name, images=data.features is not None)


def _alarm_trusted(data: Data, predict: predicted.Predict) -> list[str]:
    """An alarm where the trusted examples are memorised: far more of those trained with are right."""
    if data.held_out is None:
        return []
    trained_with, unseen = (predict(split).argmax(1) == split.labels for split in (data.trusted, data.held_out))
    gap = trained_with.mean() - unseen.mean()
    chance = binom.cdf(unseen.sum(), len(unseen), min(trained_with.mean(), 1 - 1e-3))
    if gap < MEMORISED_GAP or chance >= label_quality.MEMORISED:
        return []
    return [
        f"the network has memorised the trusted examples: it is right on {trained_with.mean():.0%} of those that it "
        f"was trained with, and on {unseen.mean():.0%} of those that were held out; train for fewer steps"
    ]


def _out_of_fold(
    folder: epath.Path, trained: Trained, data: Data, options: Options
) -> tuple[np.ndarray, np.ndarray | None]:
    """Trains one network for each fold, as the run was trained but without the examples of the fold.

    Returns:
      Probabilities `[N, K]` of the training examples, each by the network that was trained without it; and `[M, K]` of
      the trusted examples that were held out, each by one of these networks, or None where there are none.
    """
    parts = [(data.train, fold_of(data.train.ids, options.folds))]
    if data.held_out is not None:
        parts.append((data.held_out, np.arange(len(data.held_out)) % options.folds))
    found = [files.scratch((len(split), trained.num_classes), np.float32) for split, _ in parts]
    for fold in range(options.folds):
        config = _fold_config(trained.config, options, fold)
        place = folder / "folds" / str(fold)
        train_and_evaluate(config, str(place))
        network = inference.load(place)
        predict = inference.predictor(network)
        for (split, folds), probabilities in zip(parts, found, strict=True):
            whole = np.flatnonzero(folds == fold)
            for start in range(0, len(whole), predicted.AT_ONCE):
                rows = whole[start : start + predicted.AT_ONCE]
                examples = split.take(rows)
                if network.features is not None:  # standardised by its own training set
                    examples = network.features.of_features(examples, data.features)
                probabilities[rows] = predict(examples)
    return found[0], found[1] if len(found) > 1 else None


def _fold_config(config: ConfigDict, options: Options, fold: int) -> ConfigDict:
    """The configuration, as a run has written it down, of the training without one fold."""
    config = retrained.other_run(config, options.fold_method or config.method.name)
    config.data.folds, config.data.fold = options.folds, fold
    return config


def _retrain(folder: epath.Path, workdir: str, trained: Trained, data: Data) -> dict[str, Any]:
    """Trains the network anew, as `supervised`, on the labels as given and on the cleaned ones.

    Returns:
      `comparison` of the run's network and of these two, `final.Compared` as dicts; and `best`, the work folder of the
      best one: that of the cleaned labels, unless the run's network is better on held-out trusted examples.
    """
    places = {(trained.config.method.name, "given"): str(workdir)}
    for source in ("given", "cleaned"):
        config, place = retrained.other_run(trained.config, retrained.METHOD), str(folder / retrained.NAME / source)
        config.data.cleaned = str(folder / CLEANED) if source == "cleaned" else ""
        train_and_evaluate(config, place)
        places[retrained.METHOD, source] = place
    networks = [trained, *(inference.load(place) for place in list(places.values())[1:])]
    labels, found = None, [None] * len(networks)
    if data.held_out is not None:
        labels = data.held_out.labels
        found = [inference.predictor(network)(data.held_out).argmax(1) for network in networks]
    comparison = [final.compared(*about, None, classes, labels) for about, classes in zip(places, found, strict=True)]
    keep = labels is not None and final.clearly_better(found[0] == labels, found[-1] == labels)
    best = list(places.values())[0 if keep else -1]
    return {"comparison": [dataclasses.asdict(one) for one in comparison], "best": best}


def _averages(workdir: str, ids: np.ndarray) -> dict[str, np.ndarray]:
    """The averages `weight` and `trust` `[N]` of these examples in examples.npz of the run; empty without that file."""
    file = epath.Path(workdir) / "examples.npz"
    if not file.exists():
        return {}
    content = files.read_arrays(file)
    return {name: content[name][ids] for name in ("weight", "trust")}


def _columns(
    train: Split,
    class_names: Sequence[str],
    quality: Quality,
    disagreement: np.ndarray,
    averages: Mapping[str, np.ndarray],
    out_of_fold: np.ndarray | None,
) -> dict[str, np.ndarray | None]:
    """The columns of the tables, see `files.COLUMNS`; None for one of which the run knows nothing."""
    names = np.array(class_names, object)
    columns = {
        "id": train.ids,
        "path": train.names,
        "given_label": names[train.labels],
        "suggested_label": names[quality.suggested],
        "p_right": quality.right,
        "p_suggested": quality.confidence,
        "disagreement": disagreement,
        "mean_weight": averages.get("weight"),
        "mean_trust": averages.get("trust"),
    }
    if out_of_fold is not None:
        columns["self_confidence"] = out_of_fold[np.arange(len(train)), train.labels]
    return columns


def _summary(
    trained: Trained,
    train: Split,
    quality: Quality,
    alarms: list[str],
    options: Options,
    counts: dict[str, int] | None,
) -> dict[str, Any]:
    """The contents of summary.json."""
    summary = {
        "examples": len(train),
        "classes": trained.num_classes,
        "step": trained.step,
        "noise_rate": quality.noise_rate,
        "noise_interval": list(quality.noise_interval),
        "noise_interval_rests_on": quality.basis,
        "noise_by_class": quality.by_class,
        "temperature": quality.temperature,
        "held_out": quality.num_held_out,
        "held_out_accuracy": quality.held_out_accuracy,
        "pairs": quality.num_pairs,
        "calibration_error": measures.calibration_error(quality.reliability) if quality.reliability else None,
        "reliability": [list(one) for one in quality.reliability],
        "alarms": alarms,
        "transition_matrix": np.round(quality.transition, 6).tolist(),
        "class_names": list(trained.class_names),
        "threshold": options.threshold,
        "cleaned": counts,
    }
    known = train.clean_labels >= 0
    if known.any():  # as in an experiment, in which the audit can be judged
        summary["known"] = measures.judge(
            quality.right[known], quality.suggested[known], train.labels[known], train.clean_labels[known]
        )
    return summary


def _check_data(workdir: str, data: Data) -> None:
    """Raises UserError unless the data are those that the run was trained on."""
    then, now = files.read_json(epath.Path(workdir) / "data.json"), data.fingerprint()
    changed = sorted(name for name in then.keys() & now.keys() if then[name] != now[name])
    if changed:
        raise UserError(
            f"the {' and '.join(changed)} examples are not those that {workdir} was trained on (ids, names, labels or "
            f"pixels differ); bring the data back as they were, or train again"
        )


def _begin(folder: epath.Path, begun: dict[str, Any], several: bool) -> dict[str, Any] | None:
    """Makes the folder, or checks that it holds the same audit; returns the summary where that is finished.

    Args:
      folder: of the audit.
      begun: by which it knows itself again.
      several: whether what is in the folder may be of another process that has just begun the same audit.

    Raises:
      UserError: where there is something else in the folder.
    """
    if not _is_begun(folder, several):
        cli.check_new_folder("--out", folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            files.write_json(folder / BEGUN, begun)
        except (*files.storage_errors(), StorageError) as error:
            raise UserError(f"--out={folder} cannot be written: {first_line(error)}") from None
        return None
    old = json.loads((folder / BEGUN).read_text())
    changed = [name for name in begun if old.get(name) != begun[name]]
    if changed:
        details = "\n".join(f"  {name}: {old.get(name)} -> {begun[name]}" for name in changed)
        raise UserError(
            f"--out={folder} holds another audit (there -> now):\n{details}\nname a new folder; for another "
            f"threshold or with marks: python -m ieg_jax.clean --audit={folder}"
        )
    return json.loads((folder / SUMMARY).read_text()) if (folder / SUMMARY).exists() else None


def _is_begun(folder: epath.Path, several: bool) -> bool:
    """Whether the folder holds an audit; of `several` processes another one may be about to begin it."""
    until = time.monotonic() + (BEGIN_SECONDS if several else 0)
    while not (found := (folder / BEGUN).exists()) and time.monotonic() < until:
        if not (folder.is_dir() and any(folder.iterdir())):
            return False
        time.sleep(0.1)
    return found


def _absolute(path: str) -> str:
    """A path from wherever the command is given; a link in it stays one."""
    return path if files.is_remote(path) else os.path.abspath(os.path.expanduser(path))


def _is_arrays(data: ConfigDict) -> bool:
    return data.name in ("arrays", "features")


def _base(data: ConfigDict) -> str:
    """The folder that the names of images are relative to; "" where they are no paths."""
    return _absolute(str(image_files.base_folder(data))) if data.name in ("image_csv", "image_folder") else ""
