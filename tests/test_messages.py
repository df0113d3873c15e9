"""What commands and networks say to each other: errors keep their class, words and cure."""

from __future__ import annotations

from openvmnet import errors
from openvmnet.messages import Fault


def test_every_error_survives_the_wire():
    for kind in (errors.CallerError, errors.NotFound, errors.Conflict, errors.HostError, errors.MissingFeature,
                 errors.Exhausted, errors.PeerError, errors.Malformed):  # fmt: skip
        back = Fault.of(kind("words", hint="cure")).error()
        assert (type(back), back.message, back.hint) == (kind, "words", "cure")
    back = Fault.of(errors.OptionError("words", option="o", value="v")).error()
    assert (type(back), back.exit_code, back.message) == (errors.OptionError, 2, "words")
