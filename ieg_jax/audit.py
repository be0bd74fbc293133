"""Which labels are wrong: `python -m ieg_jax.audit --workdir=run --out=audit`, after training.

One pass over the training set of the run, and the folder gets

    labels.parquet, labels.csv  a row for each training example: see COLUMNS; labels.parquet has the probability of each
                                class besides
    audit.html                  the same to look at: how many labels are wrong, of which classes, the most suspicious
                                examples, to be marked keep, relabel or drop; opened as a file, it needs no network
    cleaned.csv                 path and label of each example, those below --threshold relabelled or dropped, to train
                                on
    cleanlab.npz                labels and probabilities for cleanlab, see `to_cleanlab`
    summary.json                the estimates in numbers

What the run was trained on is read again and has to be the same; it is never written to. An audit that was interrupted
goes on with the same command. `python -m ieg_jax.clean` makes another cleaned.csv, with another threshold or with the
marks that were set in the page. docs/audit.md says how P(right) comes about.
"""

import base64
import dataclasses
import datetime
import hashlib
import io
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags

from ieg_jax import cli
from ieg_jax.errors import StorageError, UserError, check_choice, first_line

# The columns of the table; the network is that of the last checkpoint.
COLUMNS = {
    "id": "of the example, the same in every run",
    "path": "of the image, as the data name it",
    "given_label": "name of the class that was given",
    "suggested_label": "the most probable class but for the given one: what the label should be if it is wrong",
    "p_right": "P(given label is right), ieg_jax.label_quality",
    "p_suggested": "P(the suggested class is the true one)",
    "disagreement": "between augmented views of the image: Jensen–Shannon divergence of their predictions, 0 to 1",
    "mean_weight": "ω relative to uniform over the last audit.epochs of training; empty where the run has none",
    "mean_trust": "λ, likewise",
    "self_confidence": "with --folds: probability of the given label by a network that was trained without the example",
}
TABLE, TABLE_CSV, PAGE, CLEANED, CLEANLAB, SUMMARY = (
    "labels.parquet", "labels.csv", "audit.html", "cleaned.csv", "cleanlab.npz", "summary.json",
)  # fmt: skip
BEGUN = "audit.json"  # what an audit was begun with
AT_ONCE = 4096  # examples that are predicted before they are written down
THUMBNAIL = 96  # pixels of the longer side, at most


@dataclasses.dataclass(frozen=True)
class Options:
    """How an audit is made.

    Attributes:
      checkpoint: a step, or best; None = the newest.
      views: augmented views of each image that are compared; 0 = none, disagreement is 0.
      threshold: labels with P(right) below it are not kept in cleaned.csv.
      below: what becomes of these: relabel or drop.
      thumbnails: images in the page, of the most suspicious examples.
      folds: out-of-fold probabilities by so many more trainings, which count for P(right) as well; 0 = none.
      fold_method: method.name of these; "" = the run's.
    """

    checkpoint: str | None = None
    views: int = 4
    threshold: float = 0.5
    below: str = "relabel"
    thumbnails: int = 1000
    folds: int = 0
    fold_method: str = ""


def audit(workdir: str, out: str, options: Options | None = None) -> dict[str, Any]:
    """Audits the labels that a run was trained on.

    Args:
      workdir: of the run.
      out: folder; new, empty, or of an audit that was interrupted.
      options: how.

    Returns:
      The contents of summary.json.

    Raises:
      UserError: where the run, its data or the folder are not what is needed.
      StorageError: where something cannot be written.
    """
    options = options or Options()
    if not 0 <= options.threshold <= 1:
        raise UserError(f"--threshold={options.threshold}: expected a probability, from 0 to 1")
    from ieg_jax import audit_page, inference, methods
    from ieg_jax.data import pipeline

    if options.folds == 1:
        raise UserError("--folds=1: expected 0 (none) or at least 2")
    if options.fold_method:
        check_choice("--fold_method", options.fold_method, methods.REGISTRY)
    trained = inference.load(workdir, options.checkpoint)
    folder = pathlib.Path(out).expanduser()
    if not (pathlib.Path(workdir) / "data.json").exists():
        raise UserError(f"{workdir} has no data.json: an audit needs the work folder of a run, not exported weights")
    data = pipeline.load(trained.config)
    _check_data(workdir, data)
    begun = {
        "workdir": os.path.abspath(workdir),
        "step": trained.step,
        "options": dataclasses.asdict(options),
        "data": data.fingerprint(),
        "base": _base(trained.config.data),
        "class_names": audit_page.distinct(trained.class_names),
    }
    if (finished := _begin(folder, begun)) is not None:
        return finished
    try:
        return _write_all(folder, workdir, trained, data, options)
    except OSError as error:
        raise StorageError(f"{folder} cannot be written: {first_line(error)}") from error


def to_cleanlab(folder: str) -> dict[str, np.ndarray]:
    """The labels and probabilities of an audit as cleanlab takes them.

        from cleanlab.filter import find_label_issues
        issues = find_label_issues(**to_cleanlab("audit"), return_indices_ranked_by="self_confidence")

    With --folds the probabilities are out of fold, as cleanlab wants them; without they are those of the network that
    was trained with these labels, which cleanlab's estimates take for more certain than they are.

    Args:
      folder: that ieg_jax.audit wrote.

    Returns:
      labels: `[N]` int64, as given, in the order of labels.parquet.
      pred_probs: `[N, K]` float64, rows that sum to 1.
    """
    with np.load(pathlib.Path(folder) / CLEANLAB, allow_pickle=False) as content:
        return {name: content[name] for name in ("labels", "pred_probs")}


def _write_all(folder: pathlib.Path, workdir: str, trained: Any, data: Any, options: Options) -> dict[str, Any]:
    from ieg_jax import audit_page, clean, inference, label_quality

    predict, train = inference.predictor(trained), data.train
    probabilities, disagreement = _pass(folder, predict, train, options.views, trained.num_classes)
    held_out = None if data.held_out is None else predict(data.held_out)
    judged, out_of_fold = (probabilities, held_out), None
    if options.folds:
        out_of_fold, held_out_too = _out_of_fold(folder, trained, data, options)
        judged = (
            label_quality.pooled([probabilities, out_of_fold]),
            None if held_out is None else label_quality.pooled([held_out, held_out_too]),
        )
    quality = label_quality.estimate(
        judged[0], train.labels, judged[1], None if data.held_out is None else data.held_out.labels
    )
    bins = [] if held_out is None else label_quality.reliability(quality, judged[1], data.held_out.labels)

    names = audit_page.distinct(trained.class_names)
    columns = _columns(train, names, quality, disagreement, _memory(workdir, train.ids), out_of_fold)
    _write_tables(folder, columns, probabilities, names)
    np.savez(
        folder / CLEANLAB,
        labels=train.labels.astype(np.int64),
        pred_probs=_normalised(probabilities if out_of_fold is None else out_of_fold),
    )
    counts = clean.write(folder, folder / CLEANED, options.threshold, options.below)
    summary = _summary(trained, train, quality, bins, options, counts)
    _write_page(folder, trained, data, quality, disagreement, columns, bins, summary, options.thumbnails)
    _write_json(folder / SUMMARY, summary)
    return summary


# ---- The pass


def _pass(
    folder: pathlib.Path, predict: Any, train: Any, views: int, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities `[N, K]` and disagreement `[N]` of the training set, part by part; finished parts are kept."""
    from rich.progress import track

    parts = folder / "parts"
    parts.mkdir(exist_ok=True)
    probabilities = np.empty((len(train), num_classes), np.float32)
    disagreement = np.empty(len(train), np.float32)
    starts = range(0, len(train), AT_ONCE)
    for start in track(starts, "predicting", transient=True, disable=len(starts) < 2):
        rows, file = np.arange(start, min(start + AT_ONCE, len(train))), parts / f"{start:09d}.npz"
        content = _read_part(file)
        if content is None:
            split = train.take(rows)
            each = np.stack([predict(split, view) for view in (None, *range(views))])
            content = {"probabilities": each[0], "disagreement": divergence(each)}
            buffer = io.BytesIO()
            np.savez(buffer, **content)
            _replace(file, buffer.getvalue())
        probabilities[rows], disagreement[rows] = content["probabilities"], content["disagreement"]
    return probabilities, disagreement


def divergence(probabilities: np.ndarray) -> np.ndarray:
    """Jensen–Shannon divergence of V distributions (Lin 1991), H(mean) − mean H, over its largest value, log V.

    Args:
      probabilities: `[V, n, K]`.

    Returns:
      `[n]` float32 in [0, 1]; 0 where V is 1.
    """
    if len(probabilities) == 1:
        return np.zeros(probabilities.shape[1], np.float32)

    def entropy(p):
        return -np.sum(p * np.log(np.clip(p, 1e-12, None)), -1)

    values = entropy(probabilities.mean(0)) - entropy(probabilities).mean(0)
    return np.clip(values / np.log(len(probabilities)), 0, 1).astype(np.float32)


def _read_part(file: pathlib.Path) -> dict[str, np.ndarray] | None:
    if not file.exists():
        return None
    with np.load(file, allow_pickle=False) as content:
        return dict(content)


def _out_of_fold(
    folder: pathlib.Path, trained: Any, data: Any, options: Options
) -> tuple[np.ndarray, np.ndarray | None]:
    """Probabilities `[N, K]` of each example by a network that was trained without it, as the run was otherwise.

    And `[M, K]` of the trusted examples that were held out, each by one of these networks; None where there are none.
    """
    from ml_collections import ConfigDict

    from ieg_jax import inference
    from ieg_jax.data import pipeline
    from ieg_jax.train import train_and_evaluate

    parts = [(data.train, pipeline.fold_of(data.train.ids, options.folds))]
    if data.held_out is not None:
        parts.append((data.held_out, np.arange(len(data.held_out)) % options.folds))
    found = [np.empty((len(split), trained.num_classes), np.float32) for split, _ in parts]
    for fold in range(options.folds):
        config = ConfigDict(trained.config.to_dict())
        config.data.folds, config.data.fold, config.audit.epochs = options.folds, fold, 0.0
        config.method.name = options.fold_method or config.method.name
        place = folder / "folds" / str(fold)
        train_and_evaluate(config, str(place))
        predict = inference.predictor(inference.load(place))
        for (split, folds), probabilities in zip(parts, found, strict=True):
            rows = np.flatnonzero(folds == fold)
            if len(rows):
                probabilities[rows] = predict(split.take(rows))
    return found[0], found[1] if len(found) > 1 else None


# ---- What is written


def _columns(
    train: Any,
    class_names: Sequence[str],
    quality: Any,
    disagreement: np.ndarray,
    memory: Mapping[str, np.ndarray],
    out_of_fold: np.ndarray | None,
) -> dict[str, Any]:
    names = np.array(class_names, object)
    columns = {
        "id": train.ids,
        "path": train.names,
        "given_label": names[train.labels],
        "suggested_label": names[quality.suggested],
        "p_right": quality.right,
        "p_suggested": quality.confidence,
        "disagreement": disagreement,
        "mean_weight": memory.get("weight"),
        "mean_trust": memory.get("trust"),
    }
    if out_of_fold is not None:
        columns["self_confidence"] = out_of_fold[np.arange(len(train)), train.labels]
    return columns


def _memory(workdir: str, ids: np.ndarray) -> dict[str, np.ndarray]:
    """What examples.npz of the run says of the examples, where there is one."""
    file = pathlib.Path(workdir) / "examples.npz"
    if not file.exists():
        return {}
    with np.load(file, allow_pickle=False) as content:
        return {name: content[name][ids] for name in ("weight", "trust")}


def _write_tables(
    folder: pathlib.Path, columns: dict[str, Any], probabilities: np.ndarray, class_names: Sequence[str]
) -> None:
    import pyarrow as pa
    from pyarrow import csv as pa_csv
    from pyarrow import parquet

    def array(values):
        if values is None:
            return pa.nulls(len(probabilities), pa.float32())
        if values.dtype == object:
            return pa.array([text.encode("utf-8", "surrogateescape").decode("utf-8", "replace") for text in values])
        return pa.array(values, from_pandas=True)  # nan = not known

    table = pa.table({name: array(values) for name, values in columns.items()})
    whole = table
    for number, name in enumerate(class_names):
        whole = whole.append_column(f"probability:{name}", pa.array(probabilities[:, number]))
    for name, write in ((TABLE, lambda file: parquet.write_table(whole, file)),
                        (TABLE_CSV, lambda file: pa_csv.write_csv(table, file))):  # fmt: skip
        buffer = io.BytesIO()
        write(buffer)
        _replace(folder / name, buffer.getvalue())


def _summary(
    trained: Any, train: Any, quality: Any, bins: list, options: Options, counts: dict[str, int]
) -> dict[str, Any]:
    from ieg_jax import label_quality

    summary = {
        "examples": len(train),
        "classes": trained.num_classes,
        "step": trained.step,
        "noise_rate": quality.noise_rate,
        "noise_interval": list(quality.noise_interval),
        "noise_by_class": quality.by_class,
        "temperature": quality.temperature,
        "held_out": quality.num_held_out,
        "calibration_error": label_quality.calibration_error(bins) if bins else None,
        "reliability": [list(one) for one in bins],
        "transition_matrix": np.round(quality.transition, 6).tolist(),
        "class_names": list(trained.class_names),
        "threshold": options.threshold,
        "cleaned": counts,
    }
    known = train.clean_labels >= 0
    if known.any():  # as in an experiment: how good the audit is
        summary["known"] = judge(quality.right[known], quality.suggested[known], train.labels[known],
                                 train.clean_labels[known])  # fmt: skip
    return summary


def judge(right: np.ndarray, suggested: np.ndarray, given: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """How good estimates are, where the true labels are known.

    Args:
      right: `[n]` P(given label is right), or any score that is higher for labels that are right.
      suggested: `[n]`, what the label should be if it is wrong.
      given: `[n]`.
      true: `[n]`.

    Returns:
      noise_rate: the true one; and where there are wrong labels and right ones: auroc of `right`; precision: of as many
      labels as are wrong, those with the lowest `right`, the share that is wrong; suggested_right: of the wrong
      labels, the share whose suggestion is true.
    """
    from sklearn.metrics import roc_auc_score

    wrong = given != true
    found = {"noise_rate": float(wrong.mean())}
    if 0 < wrong.sum() < len(wrong):
        first = np.argsort(right, kind="stable")[: wrong.sum()]
        found["auroc"] = float(roc_auc_score(wrong, -right))
        found["precision"] = float(wrong[first].mean())
        found["suggested_right"] = float((suggested == true)[wrong].mean())
    return found


def calibration_text(summary: dict[str, Any]) -> str:
    """On what P(right) was calibrated, and how well, for a person to read."""
    if not summary["held_out"]:
        return (
            "P(right) is not calibrated: no trusted image was held out of training (trusted.holdout). The order of the "
            "examples is as good as it would be, the probabilities and the noise rate may be off."
        )
    return (
        f"P(right) is calibrated on {summary['held_out']} trusted images that were held out of training (temperature "
        f"{summary['temperature']:.2f}). On these, had they been given labels as the estimated matrix draws them, it "
        f"is off by {summary['calibration_error']:.3f} on average."
    )


def _write_page(
    folder: pathlib.Path,
    trained: Any,
    data: Any,
    quality: Any,
    disagreement: np.ndarray,
    columns: dict[str, Any],
    bins: list,
    summary: dict[str, Any],
    thumbnails: int,
) -> None:
    from ieg_jax import audit_page

    config = trained.config
    facts = {
        "method": config.method.name,
        "network": config.model.name,
        "step": f"{trained.step:,}",
        "trusted images": f"{len(data.trusted):,}",
        "date": datetime.date.today().isoformat(),
    }
    page = audit_page.Page(
        title=data.name,
        facts=facts,
        class_names=tuple(trained.class_names),
        ids=data.train.ids,
        paths=data.train.names,
        given=data.train.labels,
        suggested=quality.suggested,
        right=quality.right,
        confidence=quality.confidence,
        disagreement=disagreement,
        weight=columns["mean_weight"],
        trust=columns["mean_trust"],
        noise_rate=quality.noise_rate,
        noise_interval=quality.noise_interval,
        transition=quality.transition,
        calibration=calibration_text(summary),
        reliability=bins,
        thumbnails=_thumbnails(data.train, quality.right, thumbnails),
        key=hashlib.sha256((folder / BEGUN).read_bytes()).hexdigest()[:16],
    )
    audit_page.write(page, folder / PAGE)


def _thumbnails(split: Any, right: np.ndarray, count: int) -> dict[int, str]:
    """Row -> data: URI of the image, of the `count` rows that are least likely right; none of features."""
    rows = np.argsort(right, kind="stable")[: count if split.is_visible else 0]
    return {int(row): thumbnail(image) for row, image in zip(rows, split.originals(rows), strict=True)}


def thumbnail(image: np.ndarray) -> str:
    """A data: URI of an image `[H, W, 1 or 3]` uint8."""
    from PIL import Image

    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    buffer = io.BytesIO()
    small = max(picture.size) <= THUMBNAIL // 2
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    picture.save(buffer, "PNG" if small else "JPEG", **({} if small else {"quality": 80}))
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode()}"


# ---- The folder


def _check_data(workdir: str, data: Any) -> None:
    """Raises UserError unless the data are those that the run was trained on."""
    then, now = json.loads((pathlib.Path(workdir) / "data.json").read_text()), data.fingerprint()
    changed = sorted(name for name in then.keys() & now.keys() if then[name] != now[name])
    if changed:
        raise UserError(
            f"the {' and '.join(changed)} examples are not those that {workdir} was trained on (ids, names, labels or "
            f"pixels differ); bring the data back as they were, or train again"
        )


def _begin(folder: pathlib.Path, begun: dict[str, Any]) -> dict[str, Any] | None:
    """Claims the folder; the summary where the same audit is finished there.

    Raises:
      UserError: where there is something else in it.
    """
    if (folder / BEGUN).exists():
        old = json.loads((folder / BEGUN).read_text())
        changed = [name for name in begun if old.get(name) != begun[name]]
        if changed:
            details = "\n".join(f"  {name}: {old.get(name)} -> {begun[name]}" for name in changed)
            raise UserError(
                f"--out={folder} holds another audit (there -> now):\n{details}\nname a new folder; for another "
                f"threshold or with marks: python -m ieg_jax.clean --audit={folder}"
            )
        return json.loads((folder / SUMMARY).read_text()) if (folder / SUMMARY).exists() else None
    from etils import epath

    cli.check_new_folder("--out", epath.Path(folder))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_json(folder / BEGUN, begun)
    except OSError as error:
        raise UserError(f"--out={folder} cannot be written: {first_line(error)}") from None
    return None


def _base(data: Any) -> str:
    """The folder that names of images are relative to; "" where they are no paths."""
    from ieg_jax.data import image_files

    return os.path.abspath(image_files.base_folder(data)) if data.name in ("image_csv", "image_folder") else ""


def _normalised(probabilities: np.ndarray) -> np.ndarray:
    probabilities = probabilities.astype(np.float64)
    return probabilities / probabilities.sum(1, keepdims=True)


def _write_json(file: pathlib.Path, content: dict[str, Any]) -> None:
    _replace(file, (json.dumps(content, indent=1) + "\n").encode())


def _replace(file: pathlib.Path, content: bytes) -> None:
    """Writes a file, whole or not at all."""
    partial = file.with_name(f"{file.name}.partial")
    partial.write_bytes(content)
    partial.replace(file)


def define_flags() -> None:
    """Defines the command's flags; not when it is imported, for other commands have flags of the same names."""
    usual = Options()
    flags.DEFINE_string("workdir", None, "Work folder of the run.", required=True)
    flags.DEFINE_string("out", None, "New folder, or that of an audit to go on with.", required=True)
    flags.DEFINE_string(
        "checkpoint",
        usual.checkpoint,
        "A step, or best (by checkpoint.best_metric); by default the newest that is not damaged.",
    )
    flags.DEFINE_integer("views", usual.views, "Augmented views of each image that are compared.", lower_bound=0)
    flags.DEFINE_float("threshold", usual.threshold, "Labels with P(right) below it are not kept in cleaned.csv.")
    flags.DEFINE_enum("below", usual.below, ["relabel", "drop"], "What becomes of these in cleaned.csv.")
    flags.DEFINE_integer("thumbnails", usual.thumbnails, "Images in the page.", lower_bound=0)
    flags.DEFINE_integer(
        "folds",
        usual.folds,
        "Out-of-fold probabilities by so many more trainings, which count for P(right), and are there for cleanlab; "
        "0 = none.",
        lower_bound=0,
    )
    flags.DEFINE_string("fold_method", usual.fold_method, "method.name of these, e.g. supervised; '' = the run's.")


def main(argv: list[str]) -> None:
    """Makes the audit, and says what came out."""
    del argv
    values = flags.FLAGS
    options = Options(**{field.name: values[field.name].value for field in dataclasses.fields(Options)})
    summary = audit(values.workdir, values.out, options)
    low, high = summary["noise_interval"]
    print(
        f"{summary['examples']:,} labels, {summary['noise_rate']:.1%} of them wrong (95 %: {low:.1%} to {high:.1%}); "
        f"open {pathlib.Path(values.out) / PAGE}\n{calibration_text(summary)}"
    )


if __name__ == "__main__":
    define_flags()
    cli.run(main, interrupted="the same command goes on from there")
