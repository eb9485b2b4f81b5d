"""Commands to workers as text."""

import numpy as np

from shardwright.runtime import message


def test_a_command_comes_back_with_its_arrays():
    tokens = message.int32([0, 1, 128255, -1, 2**31 - 1])
    pieces = [(1, 0, 5, tokens), (2, 3, 4, message.int32([]))]
    command = {"op": "prefill", "pieces": pieces, "last": [4, -1], "state": {"eos": [[3, -1]]}}
    found = message.decode(message.encode(command))
    assert found["op"] == "prefill" and found["last"] == [4, -1]
    assert found["state"] == {"eos": [[3, -1]]}
    for (*where, array), (*wanted, original) in zip(found["pieces"], pieces, strict=True):
        assert where == wanted and array.dtype == np.int32
        np.testing.assert_array_equal(array, original)


def test_every_other_element_of_an_array_is_sent_as_such():
    whole = message.int32(range(10))
    np.testing.assert_array_equal(
        message.decode(message.encode({"a": whole[::2]}))["a"], whole[::2]
    )
