"""The verification of identity tokens (JSON Web Tokens of OpenID Connect) before their exchange.

PyJWT verifies the signature and the registered claims. Everything that PyJWT leaves open is fixed
before: the issuer is one of the trusted ones before any key is fetched, the algorithm belongs to the
key, headers that name keys (`jku`, `x5u`, `jwk`) are not read, and the JSON is unambiguous.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import jwt

from mlflow_hokusai_auth.core.errors import AuthorityUnavailable
from mlflow_hokusai_auth.core.trust import (
    MAX_VALUE,
    Accepted,
    Refused,
    Trust,
    choose,
    shown,
)

from . import key_sets

#: Characters of a token, and levels of its JSON, at most.
MAX_TOKEN, MAX_DEPTH = 16_384, 16
#: Seconds by which clocks may differ.
LEEWAY = 60.0
#: A time of a token, in seconds since the epoch, at most: the year 5138.
_MAX_TIME = 1e11

_FORM = re.compile(r"([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)\.[A-Za-z0-9_-]+", re.ASCII)
_JSON_PART = re.compile(r'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]', re.DOTALL)


@dataclass(frozen=True, slots=True)
class Judged:
    """A verified token that is worth a key."""

    accepted: Accepted
    claims: Mapping[str, object]
    #: The digest of the token, which tells a second exchange of the same one.
    digest: str
    #: Seconds since the epoch at which nobody takes the token any more.
    ends_at: float
    #: The token's own id; "" if the issuer gives none.
    token_id: str


class Verifier:
    """Verifies tokens for this server, whose public URLs are `audiences`."""

    def __init__(self, audiences: Sequence[str], sets: key_sets.KeySets | None = None) -> None:
        self._audiences = tuple(audiences)
        self._sets = sets or key_sets.KeySets()

    def judge(
        self, token: str, trusts: Callable[[str], Sequence[Trust]], now: float
    ) -> Judged | Refused:
        """Verify `token` and judge it by the `trusts` of its issuer, oldest first.

        `now` is in seconds since the epoch. Raises AuthorityUnavailable if the trusts can't be read.
        """
        match = _FORM.fullmatch(token) if len(token) <= MAX_TOKEN else None
        if match is None:
            return _invalid(
                f"It is not three parts in base64url, of {MAX_TOKEN} characters in all."
            )
        try:
            header, claims = (_read(part) for part in match.groups())
        except ValueError as error:
            return _invalid(f"{error}.")
        issuer = claims.get("iss")
        among = trusts(issuer) if isinstance(issuer, str) else ()
        if not among:
            came = f"'{shown(issuer)}'" if isinstance(issuer, str) else "missing"
            return Refused(
                "TOKEN_UNTRUSTED",
                f"No trust of this server is for the issuer (claim iss) {came}. Its operator, "
                "or a supplier who may, adds one with `hokusai-auth trust add`.",
                "iss",
                "",
                came,
            )
        algorithm = header.get("alg")
        known = dict.fromkeys(name for trust in among for name in trust.algorithms)
        # Each trust fixes its algorithms, whatever others of its issuer allow.
        among = [trust for trust in among if algorithm in trust.algorithms]
        if not among:
            return _invalid(
                f"Its algorithm must be {' or '.join(known)}, not '{shown(str(algorithm))}'."
            )
        unverified: Refused | None = None
        untrusted: Refused | None = None
        for document in dict.fromkeys(trust.jwks for trust in among):
            group = [trust for trust in among if trust.jwks == document]
            if (refused := self._verify(token, header, claims, group[0], now)) is not None:
                unverified = unverified or refused
                continue
            verdict = _judged(token, claims, choose(group, claims, now))
            if isinstance(verdict, Judged):
                return verdict
            # The same key may be in another trust's key set.
            untrusted = untrusted or verdict
        refusal = untrusted or unverified
        assert refusal is not None
        return refusal

    def _verify(
        self,
        token: str,
        header: Mapping[str, object],
        claims: Mapping[str, object],
        trust: Trust,
        now: float,
    ) -> Refused | None:
        """Return why the token is not one of the issuer of `trust` for this server now, or None."""
        algorithm, key_id = header.get("alg"), header.get("kid", "")
        if not isinstance(key_id, str) or len(key_id) > MAX_VALUE:
            return _invalid("Its key id (kid) is no text, or too long.")
        if {"crit", "b64"} & header.keys():
            return _invalid("Its header has extensions (crit, b64) that are not understood here.")
        if problem := _time_problem(claims):
            return _invalid(problem)
        try:
            key = (
                self._sets.find(trust.issuer, key_id)
                if trust.jwks is None
                else key_sets.find_in_file(trust.jwks, key_id)
            )
        except AuthorityUnavailable as error:
            return Refused(
                "ISSUER_UNAVAILABLE",
                "The token can't be verified now: the keys of its issuer "
                f"'{shown(trust.issuer)}' can't be read. Try again.",
                retry_after=error.retry_after,
            )
        if key is None:
            return Refused(
                "TOKEN_KEY_UNKNOWN",
                f"Its key id (kid) '{shown(key_id)}' is not in the issuer's key set, which is read at "
                "most once a minute. Try again in a minute with a new token.",
            )
        if key.algorithm != algorithm:
            return _invalid(f"The key with its id is for {key.algorithm}, not for {algorithm}.")
        return self._decode(token, key, trust.issuer, claims, now)

    def _decode(
        self,
        token: str,
        key: key_sets.VerifyingKey,
        issuer: str,
        claims: Mapping[str, object],
        now: float,
    ) -> Refused | None:
        try:
            jwt.decode(
                token,
                key.key,
                algorithms=[key.algorithm],
                audience=self._audiences,
                issuer=issuer,
                leeway=LEEWAY,
                options={"require": ["exp", "iat", "iss", "aud"], "verify_sub": False},
            )
        except jwt.ExpiredSignatureError:
            late = now - _number(claims, "exp")
            return Refused(
                "TOKEN_EXPIRED",
                f"The claim exp lies {late:.0f} s in the past by this server's clock (leeway: "
                f"{LEEWAY:.0f} s). Ask the CI for a new token right before the exchange; if it is "
                "new, one of the two clocks is off by about that much.",
                "exp",
                f"{now:.0f} or later",
                f"{_number(claims, 'exp'):.0f}",
            )
        except jwt.ImmatureSignatureError:
            name = max(("nbf", "iat"), key=lambda name: _number(claims, name))
            early = _number(claims, name) - now
            return Refused(
                "TOKEN_NOT_YET_VALID",
                f"The claim {name} lies {early:.0f} s in the future by this server's clock (leeway: "
                f"{LEEWAY:.0f} s): one of the two clocks is off by about that much.",
                name,
                f"{now:.0f} or earlier",
                f"{_number(claims, name):.0f}",
            )
        except jwt.MissingRequiredClaimError as error:
            return _invalid(f"It has no claim {error.claim}.")
        except jwt.InvalidAudienceError:
            return self._wrong_audience(claims)
        except (jwt.PyJWTError, ValueError, TypeError, RecursionError):
            # The library's text is not shown: it may quote what came.
            return _invalid("Its signature does not verify with the issuer's key.")
        audience = claims["aud"]
        every = audience if isinstance(audience, list) else [audience]
        # Another audience of the token could bring it here.
        return None if set(every) <= set(self._audiences) else self._wrong_audience(claims)

    def _wrong_audience(self, claims: Mapping[str, object]) -> Refused:
        expected, came = " or ".join(self._audiences), shown(json.dumps(claims.get("aud")))
        return Refused(
            "TOKEN_AUDIENCE",
            f"The claim aud is {came}; expected: {expected}, and no other. Ask the CI for a token with "
            "this audience.",
            "aud",
            expected,
            came,
        )


def _judged(
    token: str, claims: Mapping[str, object], verdict: Accepted | Refused
) -> Judged | Refused:
    if isinstance(verdict, Refused):
        return verdict
    token_id = claims.get("jti")
    token_id = token_id if isinstance(token_id, str) and len(token_id) <= MAX_VALUE else ""
    if verdict.trust.single_use and not token_id:
        return _invalid("It has no id (claim jti), by which it could be exchanged once only.")
    # The signature is left out: some algorithms allow several for the same text.
    digest = hashlib.sha256(token.rpartition(".")[0].encode("ascii")).hexdigest()
    return Judged(verdict, claims, digest, _number(claims, "exp") + LEEWAY, token_id)


def _invalid(why: str) -> Refused:
    return Refused("TOKEN_INVALID", f"The subject token can't be used. {why}")


class _Malformed(ValueError):
    """Raised for JSON that is no object, or that two parsers read differently."""


def _read(part: str) -> dict[str, Any]:
    """Return the JSON object in a part of a token. Raises ValueError, whose text quotes nothing."""
    try:
        text = base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)).decode("utf-8")
    except ValueError:
        raise ValueError("A part is not UTF-8 in base64url") from None
    depth = 0
    for found in _JSON_PART.finditer(text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(found[0], 0)
        if depth > MAX_DEPTH:
            raise ValueError(f"Its JSON is nested deeper than {MAX_DEPTH} levels")
    try:
        content = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except _Malformed:
        raise
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise _Malformed("A part is no JSON object")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise _Malformed("A claim or a header is there twice")
    return content


def _no_constant(_: str) -> NoReturn:
    raise _Malformed("A number is not finite")


def _time_problem(claims: Mapping[str, object]) -> str | None:
    for name in ("exp", "nbf", "iat"):
        value = claims.get(name)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if name in claims and not (number and 0 <= _number(claims, name) <= _MAX_TIME):
            return f"Its claim {name} is no time in seconds since the epoch."
    return None


def _number(claims: Mapping[str, object], name: str) -> float:
    value = claims.get(name)
    try:
        return float(value) if isinstance(value, (int, float)) else -math.inf
    except OverflowError:
        return math.inf
