"""Folders of images: order, sizes, and files that are no images."""

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deepdpm.data.folders import ImageFolder, find_images


def write_image(
    path: Path, size: tuple[int, int] = (6, 8), channels: int = 3, value: int | None = None
) -> np.ndarray:
    """Write an image of height and width `size`, of noise or of one value, and give its pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = size if channels == 1 else (*size, channels)
    if value is None:
        pixels = np.random.default_rng(len(str(path))).integers(0, 256, shape, dtype=np.uint8)
    else:
        pixels = np.full(shape, value, np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def write_folder(root: Path, classes: tuple[str, ...] = ("cat", "dog"), each: int = 2) -> None:
    for label, name in enumerate(classes):
        for number in range(each):
            write_image(root / name / f"{number}.png", value=50 * label + number)


def test_rows_come_class_by_class(tmp_path: Path) -> None:
    write_folder(tmp_path)
    pixels = write_image(tmp_path / "ant" / "0.png")
    dataset = ImageFolder("pets", str(tmp_path), mean=(0.0,), std=(1.0,)).load()
    assert dataset.class_names == ("ant", "cat", "dog")
    assert dataset.image_shape == (3, 6, 8)
    assert dataset.train.labels is not None
    assert dataset.train.labels.tolist() == [0, 1, 1, 2, 2]
    np.testing.assert_allclose(
        dataset.train.x[0].numpy(), pixels.transpose(2, 0, 1).reshape(-1) / 255, atol=1e-6
    )
    np.testing.assert_allclose(dataset.train.x[3].numpy(), 50 / 255, atol=1e-6)


@pytest.mark.parametrize("held_out", ["val", "test"])
def test_a_held_out_part_keeps_the_labels_of_the_train_part(tmp_path: Path, held_out: str) -> None:
    write_folder(tmp_path / "train", ("cat", "dog"), each=3)
    write_folder(tmp_path / held_out, ("ant", "cat", "dog"), each=1)
    dataset = ImageFolder("pets", str(tmp_path)).load()
    assert dataset.test is not None
    assert dataset.test.labels is not None
    assert len(dataset.train) == 6
    assert dataset.test.labels.tolist() == [0, 1]


def test_classes_from_a_list_and_from_a_file(tmp_path: Path) -> None:
    write_folder(tmp_path / "images", ("ant", "cat", "dog"))
    (tmp_path / "classes.txt").write_text("dog Canis familiaris\nant\n\n")
    for classes in (("dog", "ant"), str(tmp_path / "classes.txt")):
        files, _ = find_images(tmp_path / "images", classes)
        assert files.class_names == ("dog", "ant")
        assert [path.parent.name for path in files.paths] == [
            files.class_names[label] for label in files.labels
        ]
    for classes, said in (
        (("dog", "dog"), "names"),
        (("owl",), "has no folder for owl"),
        ("gone.txt", "gone.txt"),
    ):
        with pytest.raises(ValueError, match=rf"dataset\.classes.*{said}"):
            find_images(tmp_path / "images", classes)


def test_broken_images_are_named_skipped_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_folder(tmp_path, each=3)
    (tmp_path / "cat" / "1.png").write_text("not an image")
    whole = (tmp_path / "dog" / "2.png").read_bytes()
    (tmp_path / "dog" / "2.png").write_bytes(whole[: len(whole) // 2])
    with caplog.at_level(logging.WARNING):
        dataset = ImageFolder("pets", str(tmp_path)).load()
    assert dataset.train.labels is not None
    assert dataset.train.labels.tolist() == [0, 0, 1, 1]
    assert str(tmp_path / "cat" / "1.png") in caplog.text
    assert str(tmp_path / "dog" / "2.png") in caplog.text
    assert "Skipped 2 of 6 images" in caplog.text


def test_a_folder_of_broken_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "0.png").touch()
    with pytest.raises(ValueError, match="none of the 1 images"):
        ImageFolder("pets", str(tmp_path)).load()


def test_empty_class_folders_are_named(tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "owl").mkdir()
    with pytest.raises(ValueError, match=r"dataset\.path.*class folders without images: owl"):
        ImageFolder("pets", str(tmp_path)).load()


def test_images_of_another_size_are_named_or_resized(tmp_path: Path) -> None:
    write_folder(tmp_path)
    write_image(tmp_path / "dog" / "1.png", size=(12, 16), value=51)
    with pytest.raises(ValueError, match=r"1\.png has 12 x 16 pixels .* 6 x 8; set dataset\.image_size"):
        ImageFolder("pets", str(tmp_path)).load()
    dataset = ImageFolder("pets", str(tmp_path), image_size=(3, 4), mean=(0.0,), std=(1.0,)).load()
    assert dataset.image_shape == (3, 3, 4)
    np.testing.assert_allclose(dataset.train.x[3].numpy(), 51 / 255, atol=1e-6)


def test_grey_and_colour_are_made_alike(tmp_path: Path) -> None:
    write_image(tmp_path / "cat" / "grey.png", channels=1, value=70)
    write_image(tmp_path / "cat" / "colour.png", channels=3, value=70)
    for channels in (1, 3):
        dataset = ImageFolder("pets", str(tmp_path), channels=channels, mean=(0.0,), std=(1.0,)).load()
        assert dataset.image_shape == (channels, 6, 8)
        np.testing.assert_allclose(dataset.train.x.numpy(), 70 / 255, atol=1e-6)


def test_bad_settings_and_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"dataset\.path: there is no folder"):
        ImageFolder("pets", str(tmp_path / "gone")).load()
    with pytest.raises(ValueError, match=r"dataset\.path is not set"):
        ImageFolder().load()
    with pytest.raises(ValueError, match="holds no folders"):
        ImageFolder("pets", str(tmp_path)).load()
    for settings, key in (
        ({"channels": 2}, "channels"),
        ({"image_size": (0, 4)}, "image_size"),
        ({"image_size": (4,)}, "image_size"),
        ({"mean": (0.1, 0.2)}, "mean"),
        ({"std": (0.0,)}, "std"),
    ):
        with pytest.raises(ValueError, match=rf"dataset\.{key}"):
            ImageFolder("pets", str(tmp_path), **settings)
