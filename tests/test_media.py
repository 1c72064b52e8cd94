"""Clips and sound in and out of files: nothing is lost, shifted, turned or recoloured on the way."""

import json
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from motionloom.data.media import (
    MediaError,
    probe,
    random_offset,
    read_clip,
    read_sound,
    resize_cover_crop,
    sound_seconds,
    write_sound,
    write_video,
)
from motionloom.data.shapeworld import Attributes, World, hear, render
from motionloom.data.shapeworld.spec import bounce_times
from motionloom.data.sheets import animated_sheet, contact_sheet
from motionloom.errors import UserError
from motionloom.rng import numpy_rng

QUADRANTS = [(250, 10, 10), (10, 250, 10), (10, 10, 250), (128, 128, 128)]  # red, green / blue, grey


def quadrants(frames=4, height=32, width=64):
    video = np.zeros((frames, height, width, 3), np.uint8)
    h, w = height // 2, width // 2
    for color, (y, x) in zip(QUADRANTS, [(0, 0), (0, w), (h, 0), (h, w)], strict=True):
        video[:, y : y + h, x : x + w] = color
    return video


def counting(frames, size=16):
    """Frame i is grey of value 6 i: a clip whose frames can be told apart after any codec."""
    levels = (np.arange(frames) * 6).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (frames, size, size, 3)).copy()


def numbers(video_FHW3):
    return np.round(video_FHW3[:, 5, 5, 0] / 6).astype(int).tolist()


def corners(picture_HW3):
    return [picture_HW3[y, x].astype(int).tolist() for y, x in ((4, 4), (4, -5), (-5, 4), (-5, -5))]


def assert_close(found, expected, tolerance=6):
    assert np.abs(np.asarray(found, int) - np.asarray(expected, int)).max() <= tolerance, found


def encode(path, frames, *, codec="libx264", pixel_format="yuv420p", times_ms=None, turn=0, source="rgb24"):
    """A video that write_video would not make: uneven times, a rotation flag, an alpha layer."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=8)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixel_format
        stream.codec_context.time_base = Fraction(1, 1000)
        if turn:
            stream.set_display_rotation(turn)
        for index, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, source).reformat(format=pixel_format)
            frame.pts = times_ms[index] if times_ms else index * 125
            frame.time_base = Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@pytest.mark.parametrize("name", ["clip.mp4", "clip.webm", "clip.webp", "clip.gif", "clip"])
@pytest.mark.parametrize("fps", [8, 23.976, 30])
def test_every_frame_comes_back_in_its_place_at_its_rate(tmp_path, name, fps):
    path = write_video(tmp_path / name, counting(20), fps, quality=95)
    info = probe(path, count=True)
    assert (info.frames, info.frames_exact, info.width, info.height) == (20, True, 16, 16)
    assert info.fps == pytest.approx(fps, rel=0.012)  # gif rounds times to 10 ms
    assert info.duration == pytest.approx(20 / fps, abs=0.011)
    assert numbers(read_clip(path).video_FHW3) == list(range(20))
    assert numbers(read_clip(path, fps=fps, frames=20).video_FHW3) == list(range(20))


@pytest.mark.parametrize("name", ["clip.webp", "clip.gif"])
def test_equal_frames_keep_their_number(tmp_path, name):
    still = np.repeat(quadrants(1), 10, axis=0)
    assert read_clip(write_video(tmp_path / name, still, 8)).video_FHW3.shape[0] == 10


def test_merged_frames_of_other_encoders_count_as_many(tmp_path):
    frames = [Image.fromarray(frame) for frame in counting(3)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=[120, 360, 120])
    clip = read_clip(tmp_path / "a.gif")
    assert clip.fps == pytest.approx(5 / 0.6)
    assert numbers(clip.video_FHW3) == [0, 1, 1, 1, 2]


@pytest.mark.parametrize("name", ["clip.mp4", "clip.webm", "clip.webp", "clip.gif", "clip"])
def test_colors_and_odd_sizes(tmp_path, name):
    path = write_video(tmp_path / name, quadrants(3, 33, 35), 8, quality=95)
    video = read_clip(path).video_FHW3
    # H.264 players need even sides: one row and one column are repeated.
    assert video.shape == ((3, 34, 36, 3) if name == "clip.mp4" else (3, 33, 35, 3))
    assert_close(corners(video[1, :32, :34]), QUADRANTS, tolerance=10)


def test_lossless_webp_and_equal_bytes(tmp_path):
    video = np.random.default_rng(0).integers(0, 256, (5, 9, 13, 3), np.uint8)
    path = write_video(tmp_path / "a.webp", video, 8, quality=100)
    assert np.array_equal(read_clip(path).video_FHW3, video)
    for suffix in (".webp", ".mp4", ".webm", ".gif"):
        first = write_video(tmp_path / f"a{suffix}", video, 8).read_bytes()
        again = write_video(tmp_path / f"b{suffix}", video, 8).read_bytes()
        assert again == first, suffix


@pytest.mark.parametrize(
    ("turn", "order"), [(-90, [2, 0, 3, 1]), (90, [1, 3, 0, 2]), (180, [3, 2, 1, 0]), (0, [0, 1, 2, 3])]
)
def test_rotation_flag_turns_the_picture(tmp_path, turn, order):
    encode(tmp_path / "phone.mp4", quadrants(), turn=turn)
    video, info = read_clip(tmp_path / "phone.mp4").video_FHW3, probe(tmp_path / "phone.mp4")
    assert video.shape[1:3] == ((64, 32) if turn in (90, -90) else (32, 64)) == (info.height, info.width)
    assert_close(corners(video[0]), [QUADRANTS[index] for index in order], tolerance=12)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_uneven_times_are_kept(tmp_path, suffix):
    path = tmp_path / f"phone{suffix}"
    encode(path, counting(6), times_ms=[0, 100, 200, 700, 800, 900])  # the last one stays until 1025
    assert numbers(read_clip(path, fps=10).video_FHW3) == [0, 1, 2, 2, 2, 2, 2, 3, 4, 5, 5]
    assert numbers(read_clip(path, fps=5).video_FHW3) == [0, 2, 2, 2, 4, 5]
    assert numbers(read_clip(path, fps=10, start=0.65, duration=0.3).video_FHW3) == [2, 3, 4]


def test_start_far_into_a_long_clip(tmp_path):
    path = write_video(tmp_path / "long.mp4", counting(40), 8, quality=95)
    assert numbers(read_clip(path, start=3.0, frames=5).video_FHW3) == [24, 25, 26, 27, 28]
    assert numbers(read_clip(path, start=3.0, frames=3, fps=4).video_FHW3) == [24, 26, 28]


@pytest.mark.parametrize(
    ("name", "codec", "pixel_format"), [("a.webm", "libvpx-vp9", "yuva420p"), ("a.mov", "png", "rgba")]
)
def test_alpha_of_a_video_lies_over_the_background(tmp_path, name, codec, pixel_format):
    frames = np.zeros((4, 32, 64, 4), np.uint8)
    frames[..., 0] = 255
    frames[:, :, 32:, 3] = 255
    encode(tmp_path / name, frames, codec=codec, pixel_format=pixel_format, source="rgba")
    assert probe(tmp_path / name).has_alpha
    picture = read_clip(tmp_path / name, background=(0, 0, 200)).video_FHW3[0]
    assert_close(picture[8, 8], (0, 0, 200))
    assert_close(picture[8, -8], (255, 0, 0))


def test_half_transparent_pixels_mix(tmp_path):
    Image.new("RGBA", (4, 4), (200, 100, 0, 128)).save(tmp_path / "a.png")
    picture = read_clip(tmp_path / "a.png", background=(0, 0, 255)).video_FHW3[0]
    assert picture[0, 0].tolist() == [100, 50, 127]


def _pictures():
    grey16 = np.full((8, 8), 0x8040, np.uint16)
    palette = Image.new("RGB", (8, 8), (10, 200, 30)).quantize(4)
    transparent = Image.new("P", (8, 8), 0)
    transparent.putpalette([255, 0, 0] + [0, 0, 0] * 255)
    return {
        "grey.png": (Image.new("L", (8, 8), 77), {}, (77, 77, 77)),
        "grey_alpha.png": (Image.new("LA", (8, 8), (77, 0)), {}, (255, 255, 255)),
        "grey16.png": (Image.fromarray(grey16), {}, (128, 128, 128)),
        "grey16.tif": (Image.fromarray(grey16), {}, (128, 128, 128)),
        "one_bit.png": (Image.new("1", (8, 8), 1), {}, (255, 255, 255)),
        "palette.png": (palette, {}, (10, 200, 30)),
        "hole.gif": (transparent, {"transparency": 0}, (255, 255, 255)),
        "cmyk.jpg": (Image.new("CMYK", (8, 8), (0, 255, 255, 0)), {"quality": 95}, (254, 0, 0)),
    }


@pytest.mark.parametrize("name", list(_pictures()))
def test_pictures_of_every_mode_become_rgb(tmp_path, name):
    image, options, expected = _pictures()[name]
    image.save(tmp_path / name, **options)
    picture = read_clip(tmp_path / name).video_FHW3[0]
    assert picture.shape == (8, 8, 3)
    assert_close(picture[4, 4], expected, tolerance=3)


def test_exif_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise to see it upright
    Image.fromarray(quadrants(1)[0]).save(tmp_path / "phone.jpg", exif=exif, quality=95)
    info = probe(tmp_path / "phone.jpg")
    assert (info.kind, info.height, info.width) == ("image", 64, 32)
    picture = read_clip(tmp_path / "phone.jpg").video_FHW3[0]
    assert_close(corners(picture), [QUADRANTS[index] for index in (2, 0, 3, 1)], tolerance=12)


def test_frame_folder_in_the_order_of_its_numbers(tmp_path):
    for index, frame in enumerate(counting(12)):
        Image.fromarray(frame).save(tmp_path / f"frame{index}.png")
    assert numbers(read_clip(tmp_path).video_FHW3) == list(range(12))
    assert probe(tmp_path).fps == 16
    assert probe(tmp_path, fps=4).duration == 3
    assert numbers(read_clip(tmp_path, source_fps=4, fps=2).video_FHW3) == [0, 2, 4, 6, 8, 10]


def test_folder_remembers_its_rate_and_is_replaced_whole(tmp_path):
    write_video(tmp_path / "clip", counting(9), 12.5)
    write_video(tmp_path / "clip", counting(4), 6.25)
    clip = read_clip(tmp_path / "clip")
    assert (clip.fps, len(clip.video_FHW3)) == (6.25, 4)
    (tmp_path / "clip" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds more than frames"):
        write_video(tmp_path / "clip", counting(4), 6.25)
    assert (tmp_path / "clip" / "notes.txt").read_text() == "mine"
    (tmp_path / "clip" / "frames.json").write_text(json.dumps({"fps": 0}))
    with pytest.raises(MediaError, match=r"frames\.json"):
        read_clip(tmp_path / "clip")


def test_short_clips_are_refused_held_looped_or_trimmed(tmp_path):
    path = write_video(tmp_path / "a.webp", counting(3), 8, quality=100)
    with pytest.raises(MediaError, match="3 of 5 frames"):
        read_clip(path, frames=5)
    assert numbers(read_clip(path, frames=5, short="hold").video_FHW3) == [0, 1, 2, 2, 2]
    assert numbers(read_clip(path, frames=5, short="loop").video_FHW3) == [0, 1, 2, 0, 1]
    assert numbers(read_clip(path, frames=5, short="trim").video_FHW3) == [0, 1, 2]
    with pytest.raises(MediaError, match="2 of 3 frames"):
        read_clip(path, frames=3, duration=0.25)
    Image.new("RGB", (8, 8)).save(tmp_path / "still.png")
    assert len(read_clip(tmp_path / "still.png").video_FHW3) == 1
    assert len(read_clip(tmp_path / "still.png", frames=5, fps=8, short="hold").video_FHW3) == 5


def test_crop_covers_centres_and_follows_its_offset():
    video = quadrants(2, 32, 64)
    middle = resize_cover_crop(video, (16, 16))
    assert middle.shape == (2, 16, 16, 3)
    assert_close(corners(middle[0]), QUADRANTS)
    assert_close(
        corners(resize_cover_crop(video, (16, 16), (0.5, 0.0))[0]), [QUADRANTS[i] for i in (0, 0, 2, 2)]
    )
    assert_close(
        corners(resize_cover_crop(video, (16, 16), (0.5, 1.0))[0]), [QUADRANTS[i] for i in (1, 1, 3, 3)]
    )
    assert resize_cover_crop(video, (32, 64)) is video
    assert random_offset("clip", 3) == random_offset("clip", 3) != random_offset("clip", 4)


def test_shrinking_averages_instead_of_picking_pixels():
    stripes = np.zeros((1, 64, 64, 3), np.uint8)
    stripes[:, :, ::2] = 255
    assert_close(resize_cover_crop(stripes, (8, 8))[0, 1:-1, 1:-1], 127, tolerance=4)


def test_reading_crops_as_the_pure_function_does(tmp_path):
    path = write_video(tmp_path / "a.webp", quadrants(3, 40, 56), 8, quality=100)
    whole = read_clip(path).video_FHW3
    expected = resize_cover_crop(whole, (16, 24), (0.2, 0.7))
    assert np.array_equal(read_clip(path, size=(16, 24), crop=(0.2, 0.7)).video_FHW3, expected)


def test_wide_pixels_are_shown_wide():
    """16 x 16 pixels, each twice as wide as high, are a 2:1 picture: a square crop of it loses the sides."""
    video = np.zeros((1, 16, 16, 3), np.uint8)
    video[:, :, :4] = 255
    assert resize_cover_crop(video, (16, 16))[0, 8, 1, 0] == 255
    assert resize_cover_crop(video, (16, 16), pixel_aspect=2.0)[0, 8, 1, 0] == 0


@pytest.mark.parametrize(("suffix", "channels"), [(".mp4", 1), (".mp4", 2), (".webm", 2)])
def test_sound_stays_in_step(tmp_path, suffix, channels):
    rate = 22_050
    time = np.arange(rate // 4) / rate
    sound = np.zeros((channels, 2 * rate), np.float32)
    sound[:, rate // 2 : rate // 2 + len(time)] = 0.5 * np.sin(2 * np.pi * (300 + 2000 * time) * time)
    path = write_video(tmp_path / f"a{suffix}", quadrants(16), 8, sound=sound, sample_rate=rate)
    assert probe(path).has_sound
    heard = read_sound(path, rate)
    assert heard.dtype == np.float32
    assert heard.shape[0] == channels
    assert 2 * rate <= heard.shape[1] < 2 * rate + 2048
    near = heard[0, rate // 2 - 2000 : rate // 2 + len(time) + 2000]
    lag = np.argmax(np.correlate(near, sound[0, rate // 2 : rate // 2 + len(time)])) - 2000
    assert abs(lag) <= 2
    assert read_sound(path, 16_000, mono=True).shape[0] == 1
    with pytest.raises(UserError, match="holds no sound"):
        write_video(tmp_path / "a.gif", quadrants(16), 8, sound=sound, sample_rate=rate)


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
@pytest.mark.parametrize("rate", [16_000, 48_000])
def test_clicks_come_back_on_the_frame_of_their_bounce(tmp_path, suffix, rate):
    """Encoders of sound look ahead and start late; what they write has to say so."""
    world = World.modes()
    spec = world.stage([Attributes("circle", "red", "small", "bounce")], "dark", numpy_rng("bounce", rate))
    clip = render(spec, rate)
    path = write_video(tmp_path / f"a{suffix}", clip.video_FHW3, spec.fps, sound=clip.sound, sample_rate=rate)
    wanted = bounce_times(spec.objects[0]) * (spec.frames - 1) / spec.fps
    assert len(wanted) >= 1
    heard = hear(read_sound(path, rate), rate).clicks
    np.testing.assert_allclose(heard, wanted, atol=0.001)  # a frame lasts 0.125
    # A player shows what the first frame's time says, not what a reader makes of it.
    for kind in ("video", "audio"):
        with av.open(str(path)) as container:
            assert next(container.decode(container.streams.best(kind))).time == pytest.approx(0, abs=0.001)


def test_aac_keeps_a_tone_clean(tmp_path):
    rate = 48_000
    tone = (0.4 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate)).astype(np.float32)[None]
    path = write_video(tmp_path / "a.mp4", quadrants(8), 8, sound=tone, sample_rate=rate)
    noise = (read_sound(path)[:, :rate] - tone)[:, 4000:-4000]
    assert 10 * np.log10(np.square(tone).mean() / np.square(noise).mean()) > 40


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".m4a"])
@pytest.mark.parametrize("rate, channels", [(16_000, 1), (44_100, 2), (17_000, 2)])
def test_sound_alone_comes_back(tmp_path, suffix, rate, channels):
    time = np.arange(rate // 2) / rate
    sound = np.stack([0.5 * np.sin(2 * np.pi * (300 + 100 * c) * time) for c in range(channels)])
    path = write_sound(tmp_path / f"a{suffix}", sound.astype(np.float32), rate)
    again = write_sound(tmp_path / f"b{suffix}", sound.astype(np.float32), rate)
    assert path.read_bytes() == again.read_bytes()
    assert sound_seconds(path) == pytest.approx(0.5, abs=0.001)
    back = read_sound(path, rate)
    assert back.shape[0] == channels
    error = np.abs(back[:, : rate // 2] - sound)
    if suffix == ".m4a":
        assert np.sqrt(np.square(error).mean()) < 0.03
    else:
        assert back.shape == sound.shape
        assert error.max() < 1 / 2**15
    assert not list(tmp_path.glob("*.tmp"))


def test_sound_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"cannot write sound as \.mp3; name it \.wav, \.flac, \.m4a"):
        write_sound(tmp_path / "a.mp3", np.zeros((1, 10), np.float32), 16_000)
    with pytest.raises(UserError, match="no sound to write"):
        write_sound(tmp_path / "a.wav", np.zeros((1, 0), np.float32), 16_000)
    loud = read_sound(write_sound(tmp_path / "a.wav", np.full((1, 100), 3, np.float32), 16_000))
    assert loud.max() == pytest.approx(1, abs=1e-4)


def test_a_sheet_of_frames(tmp_path):
    write_video(tmp_path / "sheet.png", counting(10), 8)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (32, 128, 3)
    assert numbers(np.stack([sheet[:16, 112:128], sheet[16:, 16:32]])) == [7, 9]


def test_contact_sheets_show_all_clips_and_whole_captions(tmp_path):
    videos = [quadrants(9), quadrants(1, 20, 20), counting(30)]
    captions = ["short", "", "a caption far too long for three lines " * 40]
    contact_sheet(videos, captions, tmp_path / "sheet.png", frames_per_clip=4, cell=48, columns=2)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    # Nothing may be cut off: a white margin stays free all around.
    for edge in (sheet[:6], sheet[-6:], sheet[:, :6], sheet[:, -6:]):
        assert edge.min() == 255
    assert (sheet < 60).any(axis=2).sum() > 500  # there is writing
    animated_sheet(videos, tmp_path / "moving.webp", fps=8, cell=32, captions=captions)
    moving = read_clip(tmp_path / "moving.webp")
    assert len(moving.video_FHW3) == 30
    assert not np.array_equal(moving.video_FHW3[0], moving.video_FHW3[-1])
