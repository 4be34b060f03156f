"""`scanside engine`: its threads, and what of them runs on a GPU."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from appliance.delivery.outbox import POLL_SECONDS
from appliance.governance.integrity import load_sound
from appliance.inference.decode import decode_each, decode_verified_many
from appliance.inference.preprocess import model_input
from appliance.inference.stream import Pipeline
from appliance.inference.triton import Memory, SystemMemory, TritonClient
from appliance.intake.spool import Spool
from appliance.ledger.doorbell import Doorbell
from appliance.operations.health import Watchdog, notify
from appliance.services.engine import LOOK_SECONDS, Engine
from appliance.services.issuing import Issuer
from appliance.services.process import service
from appliance.settings import Settings
from dicom_io.pixels import Decoded, decoder_for

log = logging.getLogger(__name__)

STEP_SECONDS = 60.0
"""Longest that the engine may take to look at all that there is, or systemd starts it again."""

ALERT_FIRST_SECONDS = 0.2
"""So long nothing is drawn after a verdict: its alert is on its way just then, and needs the same cores."""

RENDER_SECONDS = 300.0
"""Longest that one finding may take to be made; some take seconds."""

HANG_SECONDS = 180.0
"""A decoder that is at one slab for so long does not come back: that takes seconds, of a whole enhanced object tens."""


@dataclass(frozen=True, slots=True)
class Target:
    """What runs elsewhere on a GPU than on a CPU.

    Attributes:
        decode: as `Pipeline` wants it.
        prepare: as `model_input`.
        memory: what is shared with Triton.
    """

    decode: Callable[[Sequence[tuple[Path, str]]], Sequence[Decoded]]
    prepare: Callable[..., Any]
    memory: Memory


def target_of(settings: Settings) -> Target:
    """The parts for the settings' device; those on a GPU have proven themselves against the CPU's.

    Raises:
        ScansideError: there is no GPU, or it decodes or calculates otherwise than the CPU.
    """
    decoder = decoder_for(settings.box.device)
    if decoder is None:
        return Target(decode_each, model_input, SystemMemory())
    from appliance.inference.cuda import CudaMemory, GpuInput, find_cupy  # a CPU box does not have what it imports

    cupy = find_cupy()
    prepare = GpuInput(cupy)
    prepare.prove()
    memory: Memory = CudaMemory(cupy) if settings.triton.cuda_memory else SystemMemory()
    return Target(partial(decode_verified_many, decoder=decoder), prepare, memory)


def run_engine(settings: Settings) -> None:
    """Complete, admit, analyse and render studies until told to stop.

    Raises:
        ScansideError: the model packages cannot run together, or the ledger cannot be used.
    """
    packages, broken = load_sound(settings)
    with service(settings, "engine") as (ledger, stopping), ExitStack() as stack:
        settings.findings_directory.mkdir(parents=True, exist_ok=True)
        Spool(settings.spool_directory).recover(ledger.digests())  # intake does so as well, but may start later
        bell = Doorbell(settings.run_directory, "engine")
        stack.callback(bell.close)
        target = target_of(settings)
        client = TritonClient(
            f"{settings.triton.host}:{settings.triton.grpc_port}",
            memory=target.memory,
            timeout=settings.triton.request_seconds,
        )
        stack.callback(client.close)
        issuer = Issuer(settings, ledger, packages)
        pipeline = Pipeline(client, decode=target.decode, prepare=target.prepare)
        engine = Engine(settings, ledger, packages, client, pipeline, issuer, broken)
        stack.callback(engine.close)
        engine.guard.step()
        parked = ledger.park_analyses(settings.models.attempts)
        log.info("engine: runs %s (%d analyses taken up again)", ", ".join(one.name for one in packages), parked)
        for package in packages:
            if not package.signed_by:
                log.warning("engine: nobody signed %s; it runs because of models.allow_unsigned", package.name)
        threading.Thread(target=engine.guard.run, args=(stopping,), name="guard", daemon=True).start()
        threading.Thread(target=engine.breaker.run, args=(stopping,), name="breaker", daemon=True).start()
        threading.Thread(target=_render, args=(issuer, stopping), name="renderer", daemon=True).start()
        notify("READY=1", f"STATUS=runs {', '.join(one.name for one in packages)}")
        turn = Watchdog().loop("engine", STEP_SECONDS)
        while not stopping.is_set():
            if pipeline.longest_seconds() > HANG_SECONDS:
                # Its thread cannot be ended otherwise. What is being analysed loses a try, so that it is set aside in
                # the end; what was arriving is not worked ahead again.
                log.critical("a decoder has not come back for %g s; the engine ends and is started again", HANG_SECONDS)
                os._exit(os.EX_SOFTWARE)
            if issuer.rendering_seconds() > RENDER_SECONDS:
                log.critical(
                    "a finding has not been made in %g s; the engine ends and is started again", RENDER_SECONDS
                )
                os._exit(os.EX_SOFTWARE)  # the finding loses a try
            began = time.monotonic()
            wait = step_once(engine.step, turn)
            if wait > 0:
                # A step for each image would take as much of a core as the decoders do, and their interpreter's lock.
                bell.wait(min(wait, POLL_SECONDS), began + LOOK_SECONDS - time.monotonic())


def step_once(step: Callable[[], float], turn: Callable[[], None]) -> float:
    """One step; seconds until the next. One that stumbled is no sign of life: an engine that only stumbles is not well.

    Args:
        step: what there is to do; says how long it need not be called again.
        turn: signs.
    """
    try:
        wait = step()
    except Exception:
        log.exception("the engine stumbled; it goes on")
        return POLL_SECONDS
    turn()
    return wait


def _render(issuer: Issuer, stopping: threading.Event) -> None:
    """Make the files of findings beside the analyses: no alert waits for a picture of another study."""
    while not stopping.is_set():
        try:
            issuer.render()
        except Exception:
            log.exception("rendering stumbled; it goes on")
        if issuer.issued.wait(POLL_SECONDS):
            issuer.issued.clear()
            stopping.wait(ALERT_FIRST_SECONDS)
