"""Pictures of MuJoCo models: which OpenGL draws them, and a renderer that many worlds share.

Where the environment variable MUJOCO_GL is not set, MuJoCo takes a window system, which fails on a machine without a
display. `choose_gl` tries what there is in a process of its own, because a process that has loaded one OpenGL cannot
load another. MuJoCo reads the variable while it is imported, and torchrl imports it: a `Renderer` therefore takes its
OpenGL by the variable's value now, as Gymnasium's own renderer does.
"""

from __future__ import annotations

import atexit
import importlib
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from research.errors import UserError, describe_error

if TYPE_CHECKING:
    import mujoco

PACKAGES = "libegl1 libgl1 libgl1-mesa-dri libosmesa6"  # Debian's and Ubuntu's
_TRIAL_S = 60.0
_TRIAL = """
import os, mujoco
context = mujoco.GLContext(8, 8)
context.make_current()
mujoco.MjrContext(mujoco.MjModel.from_xml_string("<mujoco/>"), mujoco.mjtFontScale.mjFONTSCALE_100)
os._exit(0)  # some drivers fail while they are unloaded
"""
_FAR_GROUP = 5  # MuJoCo has six groups of geoms; the last one is free in the models that are drawn here


@dataclass(frozen=True)
class FreeCamera:
    """A camera that belongs to no model: metres, degrees (azimuth 90 looks along y, elevation -90 straight down)."""

    lookat: tuple[float, float, float]
    distance: float
    azimuth: float
    elevation: float


def choose_gl(asked_by: str) -> str:
    """Set MUJOCO_GL to what can draw here, before anything is drawn; a value that is set is kept.

    Tried in this order: EGL (a GPU, or Mesa in software), OSMesa, and a display where there is one. A trial takes about
    half a second, once per process. Outside Linux MuJoCo needs no choice.

    Args:
        asked_by: the option that asks for pictures, with its dotted name, for the message.
    Returns:
        the value of MUJOCO_GL, "" where it is left alone.
    Raises:
        UserError: nothing works, or not what the user has set; it says what to install.
    """
    own = os.environ.get("MUJOCO_GL", "")
    if not own and sys.platform != "linux":
        return ""
    display = ("glfw",) if os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY") else ()
    reasons = {}
    for name in (own,) if own else ("egl", "osmesa", *display):
        reason = _why_not(name)
        if reason is None:
            os.environ["MUJOCO_GL"] = name
            return name
        reasons[name] = reason
    tried = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    advice = "unset MUJOCO_GL to let this be chosen, or " if own else ""
    raise UserError(
        f"{asked_by}: MuJoCo cannot draw pictures here ({tried}); {advice}apt-get install {PACKAGES}, "
        "or ask for no pictures"
    )


def take_over_gl(chosen: str | None) -> None:
    """Draw in this process with what `choose_gl` chose in another: a worker's fork server may be older than the choice.

    Args:
        chosen: what it returned; None or "": nothing was chosen. A value that is set here is kept.
    """
    if chosen:
        os.environ.setdefault("MUJOCO_GL", chosen)


@lru_cache
def _why_not(name: str) -> str | None:
    """Why MuJoCo cannot draw with MUJOCO_GL set to this, in a few words; None: it can."""
    environment = {**os.environ, "MUJOCO_GL": name}
    try:
        done = subprocess.run(
            [sys.executable, "-c", _TRIAL], env=environment, capture_output=True, text=True, timeout=_TRIAL_S
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {_TRIAL_S:g} s"
    if done.returncode == 0:
        return None
    lines = [line.strip() for line in done.stderr.splitlines() if line and not line[0].isspace()]
    errors = [line for line in lines if "Error" in line.split(":")[0]]
    return (errors[0] if errors else f"exit code {done.returncode}")[:150]


class Renderer:
    """Draws one model, whatever the state; worlds that share the model share its renderer.

    Args:
        model: changed here: its quality settings, where `fast`, the size of its off-screen buffer, and the group of
            the geoms that are far.
        largest: pixels of the largest picture that will be asked for.
        fast: no shadows, reflections or smoothed edges. Without a GPU a picture then takes a twentieth of the time.
        far: names of meshes that pictures can leave out, see `draw`.
    Raises:
        UserError: OpenGL does not work here.
    """

    def __init__(self, model: mujoco.MjModel, largest: int, fast: bool, far: Sequence[str] = ()):
        import mujoco

        self._mujoco, self._model = mujoco, model
        if fast:
            model.vis.quality.shadowsize = model.vis.quality.offsamples = 0
        model.vis.global_.offwidth = model.vis.global_.offheight = largest
        meshes = {mesh: model.mesh(mesh).name for mesh in range(model.nmesh)}
        for geom in np.flatnonzero(model.geom_type == mujoco.mjtGeom.mjGEOM_MESH):
            if meshes[model.geom_dataid[geom]] in far:
                model.geom_group[geom] = _FAR_GROUP
        self._gl = _gl_context(os.environ.get("MUJOCO_GL", "").strip().lower())
        self._gl.make_current()
        self._scene, self._option = mujoco.MjvScene(model, 1000), mujoco.MjvOption()
        self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
        atexit.register(self._context.free)  # after the program has ended there is no OpenGL to free it with
        if fast:
            self._scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = False

    def draw(self, data: mujoco.MjData, camera: str | FreeCamera, size: int, with_far: bool = True) -> np.ndarray:
        """What a camera sees.

        Args:
            data: the state, with positions computed.
            camera: a name of the model's; one that is mounted upside down is turned upright.
            size: S, at most `largest`.
            with_far: whether the meshes that are far are drawn.
        Returns:
            uint8 `[S, S, 3]`.
        """
        mujoco, model = self._mujoco, self._model
        view, upside_down = mujoco.MjvCamera(), False
        if isinstance(camera, FreeCamera):
            view.lookat[:] = camera.lookat
            view.distance, view.azimuth, view.elevation = camera.distance, camera.azimuth, camera.elevation
        else:
            view.type, view.fixedcamid = mujoco.mjtCamera.mjCAMERA_FIXED, model.camera(camera).id
            # Row 2, column 1: the height of the picture's up direction. One that looks straight down has none.
            upside_down = model.cam_mat0[view.fixedcamid].reshape(3, 3)[2, 1] < -0.1
        self._option.geomgroup[_FAR_GROUP] = with_far
        pixels, area = np.empty((size, size, 3), np.uint8), mujoco.MjrRect(0, 0, size, size)
        self._gl.make_current()
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        everything = mujoco.mjtCatBit.mjCAT_ALL
        mujoco.mjv_updateScene(model, data, self._option, None, view, everything, self._scene)
        mujoco.mjr_render(area, self._scene, self._context)
        mujoco.mjr_readPixels(pixels, None, area, self._context)
        # OpenGL's rows run upwards.
        return np.ascontiguousarray(pixels[:, ::-1] if upside_down else pixels[::-1])


@lru_cache
def _gl_context(name: str) -> Any:
    """This process's OpenGL, which all renderers share."""
    import mujoco

    try:
        # By its module: `mujoco.GLContext` is what MUJOCO_GL said when MuJoCo was imported.
        source = importlib.import_module(f"mujoco.{name}") if name in ("egl", "osmesa", "glfw") else mujoco
        context = source.GLContext(640, 480)
    except Exception as error:  # what drivers and their bindings raise has no common class
        raise UserError(
            f"MUJOCO_GL: MuJoCo cannot draw with {name!r} here ({describe_error(error)}); unset it to let this be "
            f"chosen, or apt-get install {PACKAGES}"
        ) from error
    atexit.register(context.free)
    return context
