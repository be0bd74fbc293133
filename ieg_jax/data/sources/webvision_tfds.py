"""WebVision 1.0 for TensorFlow Datasets, so that many hosts can read sharded records from a bucket.

import ieg_jax.data.sources.webvision_tfds
tfds.builder("webvision/mini", data_dir="gs://bucket/tfds").download_and_prepare(
    download_config=tfds.download.DownloadConfig(manual_dir="webvision"))
"""

import io
import pathlib

import tensorflow_datasets as tfds
from absl import logging

from ieg_jax.data import images
from ieg_jax.data.sources import webvision_lists


class Webvision(tfds.core.GeneratorBasedBuilder):
    """The splits `train` and `validation`, with the features `image`, `label` (named by wnids) and `file_name`.

    Images that cannot be decoded are left out. The metadata name them (`left_out`), and have the `wnids` of all
    classes.
    """

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = tuple(
        tfds.core.BuilderConfig(name=name, description=f"{' and '.join(parts)} images, {name}")
        for name, parts in webvision_lists.PARTS.items()
    )
    MANUAL_DOWNLOAD_INSTRUCTIONS = """
    The folder with info/, google/ (for `full` also flickr/) and val_images_256/, unpacked from the files at
    https://data.vision.ee.ethz.ch/cvl/webvision/download.html (images resized to 256 pixels).
    """

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Images from Google and Flickr for the 1,000 classes of ILSVRC 2012, labelled by the query.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(encoding_format="jpeg"),
                    "label": tfds.features.ClassLabel(),  # gets its names when synsets.txt is read
                    "file_name": tfds.features.Text(),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://data.vision.ee.ethz.ch/cvl/webvision/",
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        folder = pathlib.Path(dl_manager.manual_dir)
        wnids = webvision_lists.read_synsets(folder / "info" / "synsets.txt")
        self.info.metadata["wnids"], self.info.metadata["left_out"] = list(wnids), {}
        is_mini = self.builder_config.name == "mini"
        self.info.features["label"].names = wnids[: webvision_lists.MINI_CLASSES] if is_mini else wnids
        parts = webvision_lists.PARTS[self.builder_config.name]
        return {
            "train": self._generate_examples(folder, parts),
            "validation": self._generate_examples(folder, ("val",)),
        }

    def _generate_examples(self, folder, parts):
        """Yields (file name, example) of the images that can be decoded, and notes the others."""
        for part in parts:
            split = webvision_lists.read_list(folder, part, len(self.info.features["label"].names))
            for path, label, name in zip(split.images.paths, split.labels, split.names, strict=True):
                try:
                    content, error = images.storable(pathlib.Path(path).read_bytes())
                except OSError as trouble:
                    content, error = b"", f"cannot be read: {trouble.strerror}"
                if error:
                    logging.warning("left out: %s: %s", name, error)
                    self.info.metadata["left_out"][name] = error
                else:
                    yield name, {"image": io.BytesIO(content), "label": int(label), "file_name": name}
