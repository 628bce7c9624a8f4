from __future__ import annotations

import io
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile

from capdistill.data import CaptionData, Example, read_image
from capdistill.data import pixels as pixels_module
from capdistill.data.images import centre_square, random_square
from capdistill.data.pixels import square_pixels
from capdistill.errors import DataError
from tests.data.data_pictures import broken_files, noise

T = Image.Transpose
UNDO = {
    1: None,
    2: T.FLIP_LEFT_RIGHT,
    3: T.ROTATE_180,
    4: T.FLIP_TOP_BOTTOM,
    5: T.TRANSPOSE,
    6: T.ROTATE_90,
    7: T.TRANSVERSE,
    8: T.ROTATE_270,
}
ORIENTED = [*(f"o{tag}.{kind}" for kind in ("jpg", "png", "webp", "tif") for tag in UNDO)]


def quadrants() -> Image.Image:
    base = Image.new("RGB", (48, 32), "red")
    boxes = (
        ("lime", (24, 0, 48, 16)),
        ("blue", (0, 16, 24, 32)),
        ("yellow", (24, 16, 48, 32)),
    )
    for colour, box in boxes:
        base.paste(colour, box)
    return base


def store_oriented(path: Path) -> Path:
    """The quadrants, stored so that a viewer shows them upright."""
    tag = int(path.stem[1:])
    turn = UNDO[tag]
    exif = Image.Exif()
    exif[0x0112] = tag
    stored = quadrants() if turn is None else quadrants().transpose(turn)
    extra = {
        ".jpg": {"quality": 95, "subsampling": 0},
        ".webp": {"lossless": True},
    }.get(path.suffix, {})
    stored.save(path, exif=exif, **extra)
    return path


def hwc(pixels: torch.Tensor) -> np.ndarray:
    return pixels.permute(1, 2, 0).numpy()


@pytest.mark.parametrize("name", ORIENTED)
def test_every_orientation_tag_gives_the_upright_picture(tmp_path: Path, name: str) -> None:
    pixels = hwc(read_image(store_oriented(tmp_path / name)))

    assert pixels.shape == (32, 48, 3)
    off = np.abs(pixels.astype(int) - np.asarray(quadrants()).astype(int)).max()
    assert off <= (4 if name.endswith("jpg") else 0)


@pytest.mark.parametrize("name", ["o6.jpg", "o5.png", "o7.webp", "o8.tif"])
def test_the_same_pixels_from_every_form_of_one_file(tmp_path: Path, name: str) -> None:
    path = store_oriented(tmp_path / name)
    wanted = read_image(path)

    data = CaptionData([Example(name, path, ("four colours",))])
    with open(path, "rb") as file, Image.open(path) as opened:
        others = [
            data[0][0],
            read_image(str(path)),
            read_image(path.read_bytes()),
            read_image(memoryview(path.read_bytes())),
            read_image(io.BytesIO(path.read_bytes())),
            read_image(file),
            read_image(opened),
        ]

    assert all(torch.equal(other, wanted) for other in others)


def test_the_users_picture_is_not_changed(tmp_path: Path) -> None:
    with Image.open(store_oriented(tmp_path / "o6.jpg")) as opened:
        before = (opened.size, opened.mode, dict(opened.info), opened.tobytes())
        read_image(opened)
        assert (opened.size, opened.mode, dict(opened.info), opened.tobytes()) == before
        assert opened.getexif()[0x0112] == 6


def test_a_damaged_exif_block_does_not_lose_the_picture(tmp_path: Path) -> None:
    quadrants().save(tmp_path / "a.png", exif=b"Exif\0\0MM\0*\0\0\xff\xff junk")
    assert read_image(tmp_path / "a.png").shape == (3, 32, 48)


RAMP = np.tile((np.arange(256, dtype=np.uint16) * 257)[None], (64, 1))


@pytest.mark.parametrize("name", ["ramp.png", "ramp.tif", "ramp_be.tif", "float.tif", "array"])
def test_a_deep_ramp_keeps_its_levels(tmp_path: Path, name: str) -> None:
    picture = Image.fromarray(RAMP)
    if name == "ramp_be.tif":
        picture = Image.fromarray(RAMP.astype(">u2"))
        assert picture.mode == "I;16B"  # `convert("I;16B")` would clip at 255 on its own
    if name == "float.tif":
        picture = Image.fromarray((RAMP / 65535).astype("float32"))
    if name == "array":
        pixels = read_image(RAMP)
    else:
        picture.save(tmp_path / name)
        pixels = read_image(tmp_path / name)

    assert pixels.shape == (3, 64, 256)
    assert torch.equal(pixels[0], pixels[1])
    assert torch.equal(pixels[0], pixels[2])
    assert (pixels[0].int() - torch.arange(256)).abs().max() <= 1
    assert pixels[0].unique().numel() >= 250


def test_a_dark_16_bit_picture_stays_dark(tmp_path: Path) -> None:
    Image.fromarray(np.full((32, 32), 5000, np.uint16)).save(tmp_path / "dark.png")
    assert set(read_image(tmp_path / "dark.png").unique().tolist()) <= {19, 20}


def test_float_pixels_beyond_one_are_refused_by_name(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 200, np.float32)).save(tmp_path / "hdr.tif")
    with pytest.raises(DataError, match=r"hdr\.tif.*expected \[0, 1\]"):
        read_image(tmp_path / "hdr.tif")


def test_32_bit_integers_without_a_known_depth_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 2**20, np.int32)).save(tmp_path / "deep.tif")
    with pytest.raises(DataError, match=r"deep\.tif.*16 bits"):
        read_image(tmp_path / "deep.tif")


def palette_with_hole() -> Image.Image:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putpixel((0, 0), 0)
    image.info["transparency"] = 0
    return image


MODES = {
    "grey": (Image.new("L", (4, 4), 90), (90, 90, 90)),
    "bilevel": (Image.new("1", (4, 4), 1), (255, 255, 255)),
    "palette": (Image.new("RGB", (4, 4), "blue").quantize(4), (0, 0, 255)),
    "transparent palette": (palette_with_hole(), (255, 255, 255)),
    "clear": (Image.new("RGBA", (4, 4), (9, 9, 9, 0)), (255, 255, 255)),
    "half red": (Image.new("RGBA", (4, 4), (255, 0, 0, 128)), (255, 127, 127)),
    "clear grey": (Image.new("LA", (4, 4), (9, 0)), (255, 255, 255)),
    "cmyk": (Image.new("CMYK", (4, 4), (0, 255, 255, 0)), (255, 0, 0)),
    "ycbcr": (Image.new("RGB", (4, 4), "white").convert("YCbCr"), (255, 255, 255)),
}


@pytest.mark.parametrize("name", MODES)
def test_every_mode_becomes_rgb_over_white(name: str) -> None:
    image, wanted = MODES[name]
    assert read_image(image)[:, 0, 0].tolist() == pytest.approx(wanted, abs=1)


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "I;16"])
def test_a_transparent_colour_of_a_png_is_white(tmp_path: Path, mode: str) -> None:
    key = (7, 7, 7) if mode == "RGB" else 7 * (mode != "1")
    Image.new(mode, (4, 4), key).save(tmp_path / "key.png", transparency=key)
    assert read_image(tmp_path / "key.png").min() == 255


@pytest.mark.parametrize(
    "array",
    [
        np.full((5, 7), 90, np.uint8),
        np.full((5, 7, 1), 90, np.uint8),
        np.full((5, 7, 3), 90, np.uint8),
        np.full((3, 5, 7), 90, np.uint8),
        np.full((5, 7), 90 * 257, np.uint16),
        np.full((5, 7, 3), 90 / 255),
        np.full((5, 7, 3), 90 / 255, np.float32),
        torch.full((3, 5, 7), 90, dtype=torch.uint8),
        torch.full((1, 5, 7), 90 / 255),
        torch.full((3, 5, 7), 90 / 255, requires_grad=True),
    ],
    ids=lambda array: f"{tuple(array.shape)}{array.dtype}",
)
def test_arrays_and_tensors_become_the_same_pixels(array: object) -> None:
    pixels = read_image(array)  # type: ignore[arg-type]
    assert pixels.shape == (3, 5, 7)
    assert pixels.dtype == torch.uint8
    assert (pixels == 90).all()


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (torch.full((3, 4, 4), -2.1), r"-2\.1.*expected \[0, 1\]"),
        (np.full((4, 4), np.nan), r"expected \[0, 1\]"),
        (np.zeros((4, 4), np.int64), "expected uint8"),
        (np.zeros((2, 4, 4, 3), np.uint8), r"\(H, W, C\)"),
        (np.zeros((0, 4, 3), np.uint8), "no pixels"),
        (b"", "empty"),
        (io.StringIO("text"), "'rb'"),
        (42, "given as int"),
        ("missing.jpg", r"missing\.jpg.*No such file.*Relative paths begin at /"),
        ("/", "It is a folder: give the image files in it"),
        ("https://example.org/dog.jpg", "is a URL: nothing is downloaded"),
        ("a\0b.jpg", "cannot be used"),
    ],
    ids=range(12),
)
def test_what_is_no_image_is_refused_with_the_reason(source: object, said: str) -> None:
    with pytest.raises(DataError, match=said):
        read_image(source)  # type: ignore[arg-type]


def test_broken_files_are_named_with_a_reason(tmp_path: Path) -> None:
    flag = ImageFile.LOAD_TRUNCATED_IMAGES
    for path in broken_files(tmp_path):
        with pytest.raises(DataError, match=path.name):
            read_image(path)
    assert flag == ImageFile.LOAD_TRUNCATED_IMAGES


def test_no_turned_bit_of_a_png_changes_the_picture_in_silence() -> None:
    file = io.BytesIO()
    Image.linear_gradient("L").save(file, "PNG")  # Pillow alone lets one in four through here
    good, wanted = file.getvalue(), read_image(file.getvalue())
    silent = 0
    for place in range(8, len(good), 9):
        bad = bytearray(good)
        bad[place] ^= 255
        try:
            silent += not torch.equal(read_image(bytes(bad)), wanted)
        except DataError:
            continue
    assert silent == 0


def test_a_decompression_bomb_is_refused(tmp_path: Path) -> None:
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    with pytest.raises(DataError, match=r"bomb\.png"):
        read_image(tmp_path / "bomb.png")


def test_an_image_beyond_the_pixel_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixels_module, "MAX_PIXELS", 64 * 64 - 1)
    with pytest.raises(DataError, match="64 x 64 pixels; at most 4,095"):
        read_image(noise())


def test_a_file_beyond_the_byte_limit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise().save(tmp_path / "large.png")
    monkeypatch.setattr(pixels_module, "MAX_BYTES", 1000)
    with pytest.raises(DataError, match=r"large\.png.*1,000 bytes"):
        read_image(tmp_path / "large.png")


def test_a_file_that_another_program_would_draw_is_refused(tmp_path: Path) -> None:
    noise().save(tmp_path / "drawing.eps")
    with pytest.raises(DataError, match=r"drawing\.eps: EPS is a drawing"):
        read_image(tmp_path / "drawing.eps")


def test_threads_may_read_and_nothing_of_the_process_is_changed(tmp_path: Path) -> None:
    quadrants().save(tmp_path / "exif.jpg", exif=b"Exif\0\0MM\0*\0\0\xff\xff junk")
    noise().save(tmp_path / "plain.jpg")
    palette_with_hole().save(tmp_path / "palette.png")
    paths = [*broken_files(tmp_path), *(tmp_path / n for n in ("exif.jpg", "plain.jpg"))] * 20
    paths += [tmp_path / "palette.png"] * 20

    def outcome(path: Path) -> object:
        try:
            return read_image(path).sum().item()
        except DataError as error:
            return str(error)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before, shown = list(warnings.filters), warnings.showwarning
        alone = [outcome(path) for path in paths]
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(outcome, paths))
        assert together == alone
        assert warnings.filters == before
        assert warnings.showwarning is shown
        with pytest.warns(UserWarning, match="still heard"):
            warnings.warn("still heard", stacklevel=1)


def test_a_home_directory_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    noise().save(tmp_path / "a.png")
    assert torch.equal(read_image("~/a.png"), read_image(tmp_path / "a.png"))


@pytest.mark.parametrize("error", [ValueError("closed"), RuntimeError("odd"), KeyError("x")])
def test_a_file_object_that_fails_is_our_error(error: Exception) -> None:
    class Broken(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            raise error

    with pytest.raises(DataError, match="cannot be read") as caught:
        read_image(Broken())
    assert caught.value.__cause__ is error


@given(st.integers(1, 70), st.integers(1, 70), st.integers(0, 50))
def test_every_size_becomes_the_square_asked_for(height: int, width: int, seed: int) -> None:
    image = torch.full((3, height, width), 9, dtype=torch.uint8)
    for made in (
        centre_square(image, 24),
        random_square(image, 24, torch.Generator().manual_seed(seed)),
    ):
        assert made.shape == (3, 24, 24)
        assert made.dtype == torch.uint8
        assert (made == 9).all()


def test_a_square_of_the_right_size_is_untouched() -> None:
    image = read_image(noise(32))
    assert torch.equal(centre_square(image, 32), image)


def test_the_centre_is_kept_of_a_long_picture() -> None:
    image = torch.zeros(3, 10, 50, dtype=torch.uint8)
    image[:, :, 20:30] = 200
    assert (centre_square(image, 10) == 200).all()


def test_a_very_long_picture_costs_no_more_than_others() -> None:
    assert centre_square(torch.zeros(3, 1, 2_000_000, dtype=torch.uint8), 64).shape[2] == 64


def test_downsizing_does_not_alias() -> None:
    checks = torch.zeros(3, 64, 64, dtype=torch.uint8)
    checks[:, ::2, 1::2] = 255
    checks[:, 1::2, ::2] = 255
    small = centre_square(checks, 16)[:, 2:-2, 2:-2].float()
    assert (small - 127.5).abs().max() < 6


@pytest.mark.parametrize("flip", [True, False])
def test_pictures_are_mirrored_only_on_request(flip: bool) -> None:
    image = torch.zeros(3, 40, 40, dtype=torch.uint8)
    image[:, :, 20:] = 200
    crops = [
        random_square(image, 16, torch.Generator().manual_seed(n), flip=flip) for n in range(40)
    ]
    mirrored = sum(bool(crop[0, 8, 0] > crop[0, 8, -1]) for crop in crops)
    assert 8 <= mirrored <= 32 if flip else mirrored == 0


def test_a_training_crop_keeps_most_of_the_picture() -> None:
    ramp = torch.arange(200, dtype=torch.uint8).expand(3, 200, 200).contiguous()
    for seed in range(40):
        crop = random_square(ramp, 50, torch.Generator().manual_seed(seed))
        assert int(crop[0, 0, -1]) - int(crop[0, 0, 0]) > 0.8 * 200


def test_the_order_of_pixels_in_memory_changes_no_value() -> None:
    """Interleaved channels, as a decoder gives them, are resized faster than planes."""
    pixels = torch.randint(256, (77, 120, 3), generator=torch.Generator().manual_seed(0))
    image = read_image(Image.fromarray(pixels.to(torch.uint8).numpy()))
    assert image.stride() == (1, 360, 3)
    planes = image.contiguous()
    assert torch.equal(centre_square(image, 32), centre_square(planes, 32))
    first, second = (
        random_square(each, 32, torch.Generator().manual_seed(1)) for each in (image, planes)
    )
    assert torch.equal(first, second)
    assert first.is_contiguous()


NATIVE = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
same_as_torch = pytest.mark.skipif(not NATIVE, reason="torch resizes in float here")


@same_as_torch
@given(
    height=st.integers(1, 400),
    width=st.integers(1, 400),
    size=st.integers(1, 260),
    seed=st.integers(0, 2**16),
    extreme=st.booleans(),
)
def test_squares_without_torch_are_those_of_torch(
    height: int, width: int, size: int, seed: int, extreme: bool
) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    pixels = (pixels > 127).astype(np.uint8) * 255 if extreme else pixels
    wanted = centre_square(torch.from_numpy(pixels).permute(2, 0, 1), size)
    assert np.array_equal(square_pixels(pixels, size), wanted.numpy())


@same_as_torch
@pytest.mark.parametrize("side", [1500, 3000])
def test_squares_of_large_photos_are_those_of_torch(side: int) -> None:
    pixels = np.random.default_rng(side).integers(0, 256, (side, side + 40, 3), np.uint8)
    wanted = centre_square(torch.from_numpy(pixels).permute(2, 0, 1), 96)
    assert np.array_equal(square_pixels(pixels, 96), wanted.numpy())


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes")
def test_an_image_that_comes_through_a_pipe_is_read_whole(tmp_path: Path) -> None:
    noise(300).save(tmp_path / "a.png")  # larger than what a pipe holds
    os.mkfifo(tmp_path / "pipe.png")
    with ThreadPoolExecutor(1) as pool:
        pool.submit((tmp_path / "pipe.png").write_bytes, (tmp_path / "a.png").read_bytes())
        assert torch.equal(read_image(tmp_path / "pipe.png"), read_image(tmp_path / "a.png"))


def test_a_file_object_is_read_from_its_beginning() -> None:
    file = io.BytesIO()
    quadrants().save(file, "PNG")  # its position is at the end
    assert np.array_equal(pixels_module.read_pixels(file), np.asarray(quadrants()))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIC"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"%PDF-1.4", "PDF"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"<!DOCTYPE html>", "download the image again"),
    ],
)
def test_what_often_has_the_suffix_of_an_image_is_recognised(data: bytes, said: str) -> None:
    with pytest.raises(DataError, match=f"not an image format.*{said}"):
        read_image(data)
