"""Reader of CMU ROADWork's COCO JSON: boxes and segmentations of 19 categories become a label and a mask.

The dataset: A. Ghosh et al., "ROADWork: A Dataset and Benchmark for Learning to Recognize, Observe,
Analyze and Drive Through Work Zones", arXiv 2406.07661.
"""

import json
import logging
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from roadwork_dist.common.errors import DataError
from roadwork_dist.config.batch import MASK_CLASSES
from roadwork_dist.config.experiment import DataConfig
from roadwork_dist.photos.images import quiet
from roadwork_dist.photos.manifest import Manifest, build_manifest

logger = logging.getLogger(__name__)

CATEGORIES: dict[str, str | None] = {
    "Cone": "cone",
    "Tubular Marker": "cone",  # single upright devices that guide traffic, like cones
    "Drum": "cone",
    "Fence": "barrier",
    "Barricade": "barrier",
    "Barrier": "barrier",
    "Vertical Panel": "barrier",
    "Temporary Traffic Control Sign": "sign",
    "Temporary Traffic Control Message Board": "sign",
    "Arrow Board": "sign",
    "Worker": "worker",
    "Work Vehicle": "vehicle",
    "Work Equipment": "equipment",
    "Other Roadwork Objects": "equipment",
    "Police Officer": None,
    "Police Vehicle": None,
    "Road": None,
    "Sidewalk": None,
    "Bike Lane": None,
}
"""ROADWork category -> class of ``MASK_CLASSES``; None = not in masks, no evidence of roadwork by itself."""

_CLASS_OF = {
    name.lower(): None if target is None else MASK_CLASSES.index(target)
    for name, target in CATEGORIES.items()
}


@dataclass(frozen=True, slots=True, eq=False)
class CocoMask:
    """A six-class mask drawn from COCO segmentations on demand.

    COCO annotates the photo as shown, so the mask is upright.
    """

    name: str
    height: int
    width: int
    shapes: tuple[tuple[int, Any], ...]
    """(class, segmentation): polygons as a tuple of float32 arrays, or an RLE mapping."""

    def content(self) -> bytes:
        """Size and shapes as JSON: stable across versions, whereas a pickle would contain the module name."""
        shapes = [
            (index, [polygon.tolist() for polygon in shape] if isinstance(shape, tuple) else shape)
            for index, shape in self.shapes
        ]
        return json.dumps([self.height, self.width, shapes], sort_keys=True).encode()

    def bits(self) -> NDArray[np.uint8]:
        """``[H, W]`` uint8, one bit per class.

        Raises:
            DataError: a segmentation cannot be drawn.
        """
        from pycocotools import mask as coco

        by_class: dict[int, list[Any]] = defaultdict(list)
        result = np.zeros((self.height, self.width), dtype=np.uint8)
        try:
            for index, shape in self.shapes:
                by_class[index] += _runs(shape, self.height, self.width)
            for index, runs in by_class.items():
                with quiet():  # pycocotools 2.0.11 uses functions that numpy 2 deprecates
                    plane = coco.decode(coco.merge(runs))
                result |= plane << index
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"{self.name}: a segmentation cannot be drawn ({error}), expected polygons or RLE of "
                f"{self.width}x{self.height} px: correct the annotation or remove it"
            ) from error
        return result


def read_coco(path: Path, config: DataConfig) -> Manifest:
    """Read a COCO JSON of ROADWork.

    A photo's label is 1 if it has an instance of any category that maps to a mask class, else 0. Metadata
    is taken from the image records if they have the configured columns. Relative file names start from
    ``config.image_root``, else from the folder of the JSON, ``images`` in it or next to it.

    Raises:
        DataError: the file is not a COCO JSON, has none of ROADWork's categories, or a record is invalid.
    """
    content = _read_json(path)
    try:
        class_of_id = _classes(content["categories"], path)
        instances: dict[Any, list[tuple[int, Any]]] = defaultdict(list)
        for annotation in content["annotations"]:
            index = class_of_id[annotation["category_id"]]
            if index is not None:
                instances[annotation["image_id"]].append((index, _shape(annotation)))
        segmented = any(shape is not None for shapes in instances.values() for _, shape in shapes)
        rows = [
            {
                **image,
                "id": str(image["id"]),
                "image": image["file_name"],
                "label": int(image["id"] in instances),
                "mask": _mask(image, instances.get(image["id"], []), path, config) if segmented else None,
            }
            for image in content["images"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path}: is not a usable COCO JSON ({type(error).__name__}: {error}), expected images "
            "(id, file_name, height, width), annotations (image_id, category_id, segmentation) and "
            "categories (id, name): export it again"
        ) from error
    columns = replace(config.columns, id="id", image="image", label="label", mask="mask")
    root = Path(config.image_root) if config.image_root else _image_root(path, content["images"])
    return build_manifest(rows, name=str(path), columns=columns, image_root=root)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}), expected a COCO JSON: export it again") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds a {type(content).__name__}, expected a COCO JSON: export it again")
    return content


def _classes(categories: list[dict[str, Any]], path: Path) -> dict[Any, int | None]:
    """Category id -> mask class; a subtype after a colon ("…Sign: left lane closed") is ignored."""
    names = {category["id"]: str(category["name"]).partition(":")[0].strip() for category in categories}
    unknown = sorted({name for name in names.values() if name.lower() not in _CLASS_OF})
    if len(unknown) == len(set(names.values())):
        raise DataError(
            f"{path}: has none of ROADWork's categories, only {', '.join(unknown) or 'no category'}, "
            f"expected {', '.join(CATEGORIES)}: provide labels in a table instead"
        )
    if unknown:
        logger.warning("%s: categories outside ROADWork are ignored: %s", path, ", ".join(unknown))
    return {number: _CLASS_OF.get(name.lower()) for number, name in names.items()}


def _shape(annotation: dict[str, Any]) -> Any:
    """Polygons in a compact form, RLE unchanged, or None if there is only a box."""
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, dict):
        return segmentation
    return tuple(np.asarray(p, dtype=np.float32) for p in segmentation or () if len(p) >= 6) or None


def _mask(
    image: dict[str, Any], instances: list[tuple[int, Any]], path: Path, config: DataConfig
) -> CocoMask | None:
    """The mask of a photo: empty without roadwork, None if an instance has only a box."""
    if any(shape is None for _, shape in instances):
        return None
    height, width = int(image["height"]), int(image["width"])
    if not 0 < height * width <= config.max_pixels:
        raise ValueError(f"{image['file_name']} is listed with {width}x{height} px")
    return CocoMask(f"{path}, mask of {image['file_name']}", height, width, tuple(instances))


def _runs(shape: Any, height: int, width: int) -> list[Any]:
    """Convert a shape to compressed RLE of pycocotools."""
    from pycocotools import mask as coco

    if isinstance(shape, tuple):
        runs: list[Any] = coco.frPyObjects([polygon.tolist() for polygon in shape], height, width)
        return runs
    if list(shape["size"]) != [height, width]:
        raise ValueError(f"RLE of size {shape['size']}")
    if isinstance(shape["counts"], list):
        return [coco.frPyObjects(shape, height, width)]
    return [shape]


def _image_root(path: Path, images: list[dict[str, Any]]) -> Path:
    candidates = [path.parent, path.parent / "images", path.parent.parent / "images"]
    first = images[0]["file_name"] if images else ""
    return next((folder for folder in candidates if (folder / first).is_file()), path.parent)
