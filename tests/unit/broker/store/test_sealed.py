from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from broker.store.sealed import KEY_BYTES, MAGIC, Broken, Key, Keyring, key_id, place, seal, unseal

KEY, OTHER = Key(b"k" * KEY_BYTES), Key(b"o" * KEY_BYTES)
RING = Keyring((KEY,))
HERE = place("t", "u", "p", 1)
texts = st.text(max_size=12)
places = st.tuples(texts, texts, texts, st.integers(0, 2**64 - 1))


@given(st.binary(max_size=300), places)
def test_what_is_sealed_opens_where_it_belongs(secret: bytes, where: tuple[str, str, str, int]) -> None:
    blob = seal(KEY, place(*where), secret)
    assert unseal(Keyring((OTHER, KEY)), place(*where), blob) == secret
    assert key_id(blob) == KEY.id
    assert len(secret) < 4 or secret not in blob[8:]


@given(places, places)
def test_no_two_places_are_written_alike(one: tuple[str, str, str, int], other: tuple[str, str, str, int]) -> None:
    assert (place(*one) == place(*other)) == (one == other)


@pytest.mark.parametrize(
    "where", [("t2", "u", "p", 1), ("t", "v", "p", 1), ("t", "u", "q", 1), ("t", "u", "p", 2), ("t", "up", "", 1)]
)
def test_it_opens_nowhere_else(where: tuple[str, str, str, int]) -> None:
    with pytest.raises(Broken, match="belongs elsewhere"):
        unseal(RING, place(*where), seal(KEY, HERE, b"secret"))


@given(st.data())
def test_no_changed_byte_goes_unnoticed(data: st.DataObject) -> None:
    blob = bytearray(seal(KEY, HERE, b"the secret"))
    at = data.draw(st.integers(0, len(blob) - 1))
    blob[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(Broken):
        unseal(RING, HERE, bytes(blob))


@given(st.integers(0, 200))
def test_a_shorter_or_longer_blob_is_broken(length: int) -> None:
    blob = seal(KEY, HERE, b"x" * 40)
    assume(length != len(blob))
    with pytest.raises(Broken):
        unseal(RING, HERE, (blob + bytes(200))[:length])


@given(st.binary(max_size=200))
def test_any_bytes_are_refused(blob: bytes) -> None:
    for junk in (blob, MAGIC + KEY.id + blob):
        with pytest.raises(Broken):
            unseal(RING, HERE, junk)


def test_another_key_is_named_not_tried() -> None:
    with pytest.raises(Broken, match=f"its key {OTHER.id.hex()} is not there"):
        unseal(RING, HERE, seal(OTHER, HERE, b"secret"))
    forged = bytearray(seal(OTHER, HERE, b"secret"))
    forged[4:8] = KEY.id
    with pytest.raises(Broken, match="changed"):
        unseal(RING, HERE, bytes(forged))


def test_no_two_blobs_are_alike() -> None:
    blobs = {seal(KEY, HERE, b"same") for _ in range(200)}
    assert len({blob[8:40] for blob in blobs}) == len({blob[40:52] for blob in blobs}) == 200


def test_keys_are_not_shown() -> None:
    assert KEY.secret.decode() not in repr(RING) + str(KEY)
    with pytest.raises(Broken) as caught:
        unseal(RING, HERE, seal(KEY, place("t", "u", "p", 9), b"plain text"))
    assert "plain" not in repr(caught.value.__cause__) + repr(caught.value.__context__)
