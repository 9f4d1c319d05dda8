"""Interrupts of a driver: none is lost, whatever waits for them."""

from __future__ import annotations

import asyncio

import pytest

from coordinator.jobs.interrupts import CancelWish, Interrupts, PauseWish


def test_interrupts_come_out_in_their_order() -> None:
    async def main() -> list[object]:
        interrupts = Interrupts()
        interrupts.put(PauseWish())
        interrupts.put(CancelWish())
        await interrupts.wait()
        taken: list[object] = [interrupts.take(), interrupts.take()]
        assert not interrupts.has_any
        return taken

    assert asyncio.run(main()) == [PauseWish(), CancelWish()]


def test_interrupt_that_comes_while_its_waiter_ends_is_there_for_the_next() -> None:
    async def main() -> bool:
        interrupts = Interrupts()
        waiter = asyncio.create_task(interrupts.wait())
        await asyncio.sleep(0)
        interrupts.put(CancelWish())
        await waiter  # it has seen the interrupt, and nobody asks it any more
        return interrupts.has_any

    assert asyncio.run(main())


def test_wait_goes_on_after_the_last_was_taken() -> None:
    async def main() -> None:
        interrupts = Interrupts()
        interrupts.put(CancelWish())
        interrupts.take()
        waiter = asyncio.create_task(interrupts.wait())
        await asyncio.sleep(0)
        assert not waiter.done()
        waiter.cancel()

    asyncio.run(main())


def test_taking_from_none_raises() -> None:
    with pytest.raises(IndexError):
        Interrupts().take()
