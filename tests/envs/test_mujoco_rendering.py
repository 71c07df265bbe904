"""envs/mujoco_rendering.py, on a model of a few geoms; what cannot draw is a MUJOCO_GL that does not exist."""

from __future__ import annotations

import os
import sys

import mujoco
import numpy as np
import pytest

from envs import mujoco_rendering
from envs.mujoco_rendering import FreeCamera, Renderer, choose_gl
from research.errors import UserError

# A red ball stands 0.5 m above a blue one; "hung" is "front", turned by 180 degrees about the line of sight.
MODEL = """
<mujoco>
  <visual><headlight ambient="1 1 1" diffuse="0 0 0" specular="0 0 0"/></visual>
  <asset>
    <mesh name="far" vertex="0 0 0  .2 0 0  0 .2 0  0 0 .2"/>
    <material name="mirror" rgba=".1 .1 .1 1" reflectance=".9"/>
  </asset>
  <worldbody>
    <camera name="front" pos="0 -2 .25" xyaxes="1 0 0 0 0 1"/>
    <camera name="hung" pos="0 -2 .25" xyaxes="-1 0 0 0 0 -1"/>
    <geom type="sphere" size=".1" pos="0 0 .5" rgba="1 0 0 1"/>
    <geom type="sphere" size=".1" pos="0 0 0" rgba="0 0 1 1"/>
    <geom type="plane" size="1 1 .1" pos="0 0 -.2" material="mirror"/>
    <geom type="mesh" mesh="far" pos=".4 0 .2" rgba="0 1 0 1"/>
  </worldbody>
</mujoco>
"""


@pytest.fixture(scope="module")
def drawn():
    choose_gl("trainer.env_config.render")
    model = mujoco.MjModel.from_xml_string(MODEL)
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    renderer = Renderer(model, largest=64, fast=True, far=("far",))
    return lambda *args, **options: renderer.draw(data, *args, **options)


def pixels_of(picture: np.ndarray, channel: int) -> np.ndarray:
    """The (row, column) `[pixels, 2]` where one channel is bright and the others are dark."""
    others = np.delete(picture, channel, axis=2).max(axis=2)
    return np.argwhere((picture[..., channel] > 150) & (others < 60))


@pytest.mark.parametrize("camera", ["front", "hung", FreeCamera((0, 0, 0.25), 2, azimuth=90, elevation=0)])
def test_pictures_are_upright_whichever_way_the_camera_is_mounted(drawn, camera):
    picture = drawn(camera, 64)
    assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8 and picture.flags.c_contiguous
    red, blue, green = (pixels_of(picture, channel).mean(axis=0) for channel in (0, 2, 1))
    assert red[0] < 32 < blue[0] and abs(red[1] - 31.5) < 1 and green[1] > 36


def test_fast_pictures_have_no_reflections(drawn):
    """The blue ball is 8 pixels high, and its mirror image would be 15 pixels below it."""
    assert np.ptp(pixels_of(drawn("front", 64), 2)[:, 0]) < 9


def test_far_meshes_can_be_left_out(drawn):
    assert len(pixels_of(drawn("front", 48), 1)) > 10 and not len(pixels_of(drawn("front", 48, with_far=False), 1))


def test_pictures_do_not_depend_on_what_was_drawn_before(drawn):
    first = drawn("front", 48)
    drawn("hung", 64, with_far=False)
    assert np.array_equal(first, drawn("front", 48))


def test_what_works_is_chosen_and_set_for_worker_processes(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "")
    monkeypatch.setattr(mujoco_rendering, "_why_not", lambda name: None if name == "osmesa" else "no such library")
    assert choose_gl("trainer.env_config.render") == os.environ["MUJOCO_GL"] == "osmesa"


def test_a_value_of_the_users_is_kept(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    monkeypatch.setattr(mujoco_rendering, "_why_not", lambda name: None)
    assert choose_gl("trainer.env_config.render") == os.environ["MUJOCO_GL"] == "osmesa"


def test_a_value_of_the_users_that_does_not_work_is_one_line(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "vulkan")
    with pytest.raises(UserError, match=r"^trainer\.env_config\.render: .*vulkan: RuntimeError.*unset MUJOCO_GL.*$"):
        choose_gl("trainer.env_config.render")
    assert os.environ["MUJOCO_GL"] == "vulkan"


def test_where_nothing_works_the_line_says_what_to_install(monkeypatch):
    for name in ("MUJOCO_GL", "DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    mujoco_rendering._why_not.cache_clear()
    with pytest.raises(UserError) as refused:
        choose_gl("trainer.env_config.render")
    mujoco_rendering._why_not.cache_clear()
    text = str(refused.value)
    assert "egl: exit code 1; osmesa: exit code 1" in text and "apt-get install libegl1" in text and "\n" not in text
    assert "glfw" not in text and os.environ["MUJOCO_GL"] == ""


def test_opengl_that_fails_when_it_is_needed_is_one_line(drawn):
    another = "osmesa" if os.environ["MUJOCO_GL"] == "egl" else "egl"  # one process cannot load both
    with pytest.raises(UserError, match=rf"^MUJOCO_GL: MuJoCo cannot draw with '{another}' here \("):
        mujoco_rendering._gl_context(another)
