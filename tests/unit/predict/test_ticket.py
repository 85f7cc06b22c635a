"""A ticket is answered once, and may be waited for at any time."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from mlflow_safeflavor.predict.ticket import Ticket


def test_a_ticket_ends_once_and_may_be_waited_for_again():
    ticket = Ticket([{}, {}], [1, 2], {}, "")
    outputs = [{"length": np.array(1)}, {"length": np.array(2)}]
    ticket.give(1, outputs[1])
    assert not ticket.wait(0)
    waits = threading.Thread(target=ticket.wait, args=(None,))
    waits.start()
    ticket.give(0, outputs[0])
    waits.join(20)
    assert not waits.is_alive()
    assert ticket.wait(None)
    assert ticket.wait(0)
    assert ticket.result() == outputs
    # As where the rest of a batch failed.
    ticket.fail(ZeroDivisionError("after its end"))
    assert ticket.wait(0)


def test_what_fails_ends_a_ticket_for_all_that_wait():
    ticket = Ticket([{}], [1], {}, "")
    waits = [threading.Thread(target=ticket.wait, args=(20,)) for _ in range(3)]
    for thread in waits:
        thread.start()
    ticket.fail(ZeroDivisionError("no answer"))
    for thread in waits:
        thread.join(5)
        assert not thread.is_alive()
    with pytest.raises(ZeroDivisionError, match="no answer"):
        ticket.result()
