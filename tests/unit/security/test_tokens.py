from __future__ import annotations

import base64
import json

import pytest

from plutino.errors import SecurityError
from plutino.security.tokens import JoinToken, hash_secret, hide_tokens, is_secret, new_salt, new_secret, new_token_id


def make_token() -> JoinToken:
    return JoinToken(("192.0.2.7:7422", "[2001:db8::1]:7422"), bytes(range(32)), new_token_id(), new_secret())


def test_token_is_read_back_from_its_text_also_with_space_around_it():
    token = make_token()

    assert JoinToken.decode(f"  {token.encode()}\n") == token


@pytest.mark.parametrize("cut", [1, 10, 60])
def test_token_that_was_not_copied_whole_is_refused_without_a_word_of_it(cut):
    text = make_token().encode()[:-cut]

    with pytest.raises(SecurityError) as refused:
        JoinToken.decode(text)
    assert text[20:40] not in str(refused.value)


@pytest.mark.parametrize("change", [{"a": []}, {"a": ["x"] * 99}, {"f": "AAAA"}, {"s": ""}, {"i": "../x"}, {"a": None}])
def test_token_with_values_out_of_bounds_is_refused(change):
    body = make_token().encode().removeprefix("plutino1_")
    values = {**json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4))), **change}
    text = "plutino1_" + base64.urlsafe_b64encode(json.dumps(values).encode()).rstrip(b"=").decode()

    with pytest.raises(SecurityError, match="damaged"):
        JoinToken.decode(text)


@pytest.mark.parametrize("text", ["", "hunter2", "plutino1_", "plutino1_" + "a" * 9000, "plutino1_ä"])
def test_text_that_is_no_token_is_refused_with_the_way_out(text):
    with pytest.raises(SecurityError, match="token"):
        JoinToken.decode(text)


def test_secret_shows_in_no_representation():
    token = make_token()

    assert token.secret.hex() not in repr(token) and repr(token.secret) not in repr(token)


def test_secret_is_known_by_its_salted_hash_alone():
    secret, salt = new_secret(), new_salt()
    hashed = hash_secret(salt, secret)

    assert is_secret(salt, hashed, secret)
    assert not is_secret(salt, hashed, new_secret()) and not is_secret(new_salt(), hashed, secret)


def test_tokens_in_a_text_are_hidden():
    text = make_token().encode()

    assert hide_tokens(f"argv: join {text} --name x") == "argv: join plutino1_(hidden) --name x"
