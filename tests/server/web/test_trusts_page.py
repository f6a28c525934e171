"""The page of trusts in process: what each kind of key sees, and each form with its refusals."""

from __future__ import annotations

import re
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import flask
import pytest
from werkzeug.test import TestResponse

from mlflow_hokusai_auth.core import browser, keys
from mlflow_hokusai_auth.core.errors import AuthorityUnavailable
from mlflow_hokusai_auth.core.lifetimes import Lifetimes
from mlflow_hokusai_auth.core.trust import workload
from mlflow_hokusai_auth.core.trust_words import warning
from mlflow_hokusai_auth.core.types import Principal
from mlflow_hokusai_auth.server.web import pages as web_pages
from mlflow_hokusai_auth.server.web.pages import trusts as trusts_page
from mlflow_hokusai_auth.store.keys import LocalStore
from mlflow_hokusai_auth.store.sessions import Sessions
from mlflow_hokusai_auth.store.trusts import Trusts
from tests.core.test_trust import GITHUB
from tests.server.sentinel import make_gate
from tests.server.web.test_pages import Pages

TOKEN = keys.session_token()
COOKIE = {"Cookie": f"{browser.LOOPBACK_COOKIE}={TOKEN}"}
ADMIN = Principal("key_admin", "operator", frozenset({"mlflow:admin"}), owner_id="operator")
FORM = {
    "service": "github",
    "project": "acme/models",
    "workflow": "release.yml",
    "environment": "prod",
    "minutes": "10",
    "scopes": "model:write",
    "models": "acme-*\r\nlead\r\n",
}


class TrustsPage:
    """The pages, where suppliers manage trusts or not."""

    def __init__(
        self, folder: Path, *, suppliers: bool = True, has_store: bool = True, **more: Any
    ) -> None:
        store = LocalStore(f"sqlite:///{folder}/keys.db")
        store.migrate()
        gate = make_gate()
        gate = make_gate(policy=replace(gate.policy, supplier_trust=suppliers))
        app = flask.Flask("mlflow")
        sessions = Sessions(store.database)
        app.register_blueprint(
            web_pages.blueprint(store, sessions, gate, 60.0, has_store=has_store, **more)
        )
        self.pages = Pages(store, app, sessions)
        self.store, self.trusts = store, Trusts(store.database)

    def key(self, owner: str = "ACME", *scopes: str, **more: Any) -> Principal:
        found = self.store.lookup(
            self.store.create(owner=owner, scopes=scopes or ["model:write"], **more)[1]
        )
        assert isinstance(found, Principal)
        return found

    def add(self, owner: str = "ACME", **given: Any) -> str:
        given = given or {"github": "acme/models", "workflow": "release.yml"}
        return self.trusts.add(
            workload(**given), owner=owner, scopes=("model:write",), ttl=900.0
        ).trust.trust_id

    def get(
        self, query: str = "", caller: Principal = ADMIN, status: int = 200, page: str = "trusts"
    ) -> str:
        path = f"/hokusai/{page}{query and '?'}{query}"
        answer = self.pages.ask("GET", path, caller, headers=COOKIE)
        assert answer.status_code == status, answer.text
        return unescape(answer.text)

    def post(
        self, what: str, fields: dict[str, Any], caller: Principal = ADMIN, **headers: str
    ) -> TestResponse:
        data = {"csrf": browser.csrf_token(TOKEN)} | fields
        path = f"/hokusai/trusts/{what}"
        return self.pages.ask("POST", path, caller, headers=COOKIE | headers, data=data)

    def done(self, what: str, fields: dict[str, Any], caller: Principal = ADMIN) -> str:
        """Send a form that works. Return what the page after it says."""
        answer = self.post(what, fields, caller)
        assert answer.status_code == 303, answer.text
        url = urljoin(f"http://localhost/hokusai/trusts/{what}", answer.headers["Location"])
        assert urlsplit(url).path == "/hokusai/trusts"
        found = re.search(r'role="status"[^>]*>([^<]*)<', self.get(urlsplit(url).query, caller))
        return found[1] if found else ""

    def refused(
        self, what: str, fields: dict[str, Any], status: int, caller: Principal = ADMIN
    ) -> tuple[str, str]:
        """Send a form that is refused. Return the wrong field's name, or "", and the message."""
        answer = self.post(what, fields, caller)
        assert answer.status_code == status, answer.text
        text = unescape(answer.text)
        found = re.search(r'role="alert"[^>]*>([^<]*)<', text)
        assert found, text
        field = re.search(r'name="(\w+)"[^>]*aria-invalid="true"', text)
        return field[1] if field else "", found[1]


@pytest.fixture
def here(tmp_path: Path) -> TrustsPage:
    return TrustsPage(tmp_path)


def test_list_says_what_is_trusted_in_words(here: TrustsPage) -> None:
    first = here.add()
    here.add("Globex", issuer="https://i.example", claims={"sub": "job"})
    exchanged = here.trusts.exchange(
        first, GITHUB, digest="0" * 64, token_id="1", ends_at=2e9, jwks=None
    )
    assert isinstance(exchanged, tuple)
    page = here.get()
    for text in (
        "release.yml of acme/models on GitHub",
        "tokens of https://i.example, with sub job",
        first,
        "Globex",
        "1 exchange<",
        "never, since",
        ">repository_id</span> 74",
        ">repository_owner_id</span> 65",
        "for 15 min",
        "trust add --owner NAME --issuer URL",
    ):
        assert text in page, text
    page = here.get("owner=Globex")
    assert "acme/models on GitHub" not in page
    assert "i.example" in page
    assert "No trust of this owner" in here.get("owner=globex")
    assert "page must be" in here.get("page=x", status=400)


def test_list_has_pages(here: TrustsPage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trusts_page, "_ROWS", 2)
    for name in "abc":
        here.add(gitlab=f"acme/{name}")
    assert "acme/c" not in here.get()
    page = here.get("page=2")
    assert "acme/c on GitLab" in page
    assert "acme/a" not in page


def test_operator_adds_and_removes(here: TrustsPage) -> None:
    said = here.done("add", {**FORM, "owner": "ACME"})
    assert said == (
        "Trusted: release.yml of acme/models on GitHub, environment prod. Its jobs get keys of ACME."
    )
    (record,) = here.trusts.each()
    trust = record.trust
    assert (trust.owner, trust.ttl, trust.models) == ("ACME", 600.0, ("acme-*", "lead"))
    assert (trust.scopes, trust.no_delete) == (("model:write",), False)
    fields = {"service": "gitlab", "project": "a/b", "minutes": "60", "no_delete": "on"}
    here.done("add", {**fields, "scopes": ["model:read", "model:write"], "owner": "ACME"})
    other = here.trusts.each()[1].trust
    assert (other.kind, other.scopes) == ("gitlab", ("model:read", "model:write"))
    assert other.no_delete
    assert not any(warning(one.kind, dict(one.claims)) for one in (trust, other))
    said = here.done("remove", {"trust_id": trust.trust_id, "back": "owner=ACME"})
    assert said.startswith("Not trusted any more: release.yml of acme/models")
    assert here.trusts.each()[0].trust == other
    assert "There is no trust" in here.refused("remove", {"trust_id": trust.trust_id}, 404)[1]
    events = [row["event"] for row in here.store.database.audited() if "trust" in row["event"]]
    assert events == ["trust.added", "trust.added", "trust.removed"]


def test_trust_without_an_environment_is_added_with_the_warning_of_the_command_line(
    here: TrustsPage,
) -> None:
    answer = here.post("add", {**FORM, "owner": "ACME", "environment": ""})
    page = here.get(urlsplit(answer.headers["Location"]).query)
    (record,) = here.trusts.each()
    text = warning(record.trust.kind, dict(record.trust.claims))
    assert "may push to any branch" in text and text in page
    assert 'role="status" tabindex="-1" autofocus aria-describedby="warning">Trusted' in page


def test_refused_form_says_which_field_is_wrong_and_keeps_what_was_typed(here: TrustsPage) -> None:
    form = {**FORM, "owner": "ACME"}
    for change, field, words in (
        ({"project": ""}, "project", "Fill this in."),
        ({"project": "acme"}, "project", "org/repo"),
        ({"service": "gitlab", "project": "acme"}, "project", "group/project"),
        ({"workflow": ""}, "workflow", "Fill this in."),
        ({"workflow": "release"}, "workflow", "release.yml"),
        ({"owner": ""}, "owner", "Name the owner"),
        ({"minutes": "soon"}, "minutes", "whole number"),
        ({"minutes": "61"}, "minutes", "3600"),
        ({"minutes": "0"}, "minutes", "60"),
        ({"minutes": "9" * 400}, "minutes", ""),
        ({"models": "a*b"}, "models", "only at its end"),
        ({"scopes": []}, "", "Choose at least one"),
        ({"scopes": ["mlflow:admin"]}, "", "outlive the trust"),
        ({"service": "bitbucket"}, "", "must be github or gitlab"),
        ({"environment": "a*b"}, "", "environment"),
    ):
        found, message = here.refused("add", {**form, **change}, 400)
        assert (found, words in message) == (field, True), (change, found, message)
    text = unescape(here.post("add", {**form, "project": "acme"}).text)
    for kept in ('value="release.yml"', 'value="prod"', 'value="10"', ">acme-*", 'value="ACME"'):
        assert kept in text, kept
    assert here.trusts.each() == []


def test_supplier_sees_and_changes_its_own_only(here: TrustsPage) -> None:
    theirs = here.add("Globex", gitlab="globex/models")
    here.key("Initech")
    mine = here.key(models=["acme-*"])
    page = here.get(caller=mine)
    assert "globex" not in page.lower() and "Initech" not in page
    assert "No trusts yet" in page
    # The form offers what the key has.
    assert ">acme-*</textarea>" in page
    assert 'value="model:read"' in page
    assert 'value="mlflow:read"' not in page
    assert 'name="owner"' not in page
    assert "--issuer" not in page
    here.done("add", {**FORM, "models": "acme-*"}, mine)
    (own,) = [one.trust for one in here.trusts.each() if one.trust.owner == "ACME"]
    assert own.trust_id in here.get(caller=mine)
    assert "own owner only" in here.refused("add", {**FORM, "owner": "Globex"}, 403, mine)[1]
    assert "acme-*" in here.refused("add", {**FORM, "models": ""}, 403, mine)[1]
    foreign = here.refused("remove", {"trust_id": theirs}, 404, mine)
    made_up = here.refused("remove", {"trust_id": "trust_0"}, 404, mine)
    assert foreign[1].replace(theirs, "trust_0") == made_up[1]
    taken = {**FORM, "service": "gitlab", "project": "globex/models", "models": "acme-*"}
    assert "not free" in here.refused("add", taken, 409, mine)[1]
    here.done("remove", {"trust_id": own.trust_id}, mine)
    assert [one.trust.trust_id for one in here.trusts.each()] == [theirs]


def changed(here: TrustsPage, trust_id: str, **changes: Any) -> dict[str, Any]:
    """Return the fields of the form of a trust as the page has it, with `changes`; None: unticked."""
    page = here.get(page=f"trusts/{trust_id}/edit")
    found = re.search(r'name="minutes" value="([^"]*)"', page)
    models = re.search(r"<textarea[^>]*>([^<]*)</textarea>", page)
    seen = re.search(r'name="seen" value="([^"]+)"', page)
    assert found and models and seen
    fields = {
        "seen": seen[1],
        "minutes": found[1],
        "models": models[1],
        "scopes": re.findall(r'name="scopes" value="([^"]*)" checked', page),
        **({"no_delete": "on"} if 'name="no_delete" checked' in page else {}),
    }
    return {name: value for name, value in {**fields, **changes}.items() if value is not None}


def test_operator_edits_and_the_page_says_what_became_of_the_keys(here: TrustsPage) -> None:
    trust_id = here.add()
    here.trusts.edit(trust_id, {"ttl": 90.0, "models": ("acme-*",), "no_delete": True})
    made = here.trusts.exchange(
        trust_id, GITHUB, digest="0" * 64, token_id="1", ends_at=2e9, jwks=None
    )
    assert isinstance(made, tuple)
    edit = f"{trust_id}/edit"
    page = here.get(page=f"trusts/{edit}")
    for text in ("release.yml of acme/models on GitHub", "Saving ends the keys", 'value="1.5"'):
        assert text in page, text
    assert "repository_id 74" in page

    def ended() -> bool:
        return here.store.get(made[0].key_id).revoked_at is not None

    audit = here.store.database.audited()
    same = changed(here, trust_id)
    assert (same["scopes"], same["models"], same["no_delete"]) == (["model:write"], "acme-*", "on")
    assert here.done(edit, same).startswith("Nothing was changed")
    assert here.store.database.audited() == audit
    said = here.done(edit, changed(here, trust_id, minutes="10"))
    assert "stay as they are" in said and not ended()
    fields = changed(here, trust_id, models="a-*\r\nb", scopes=["model:read"], no_delete=None)
    said = here.done(edit, {**fields, "forget_ids": "on", "back": "owner=ACME"})
    assert said == (
        "Changed: release.yml of acme/models on GitHub. The keys that its jobs had end within a second."
    )
    assert ended()
    trust = here.trusts.get(trust_id).trust
    assert (trust.scopes, trust.models, trust.ttl) == (("model:read",), ("a-*", "b"), 600.0)
    assert not trust.no_delete and trust.pins == ()
    assert "moved or made again" not in here.get(page=f"trusts/{edit}")
    (event,) = [row for row in here.store.database.audited() if row["event"] == "trust.edited"][-1:]
    assert (event["actor"], event["detail"]["scopes"]) == ("operator", ["model:read"])


def test_refused_edit_says_which_field_is_wrong_and_keeps_what_was_typed(here: TrustsPage) -> None:
    trust_id = here.add()
    for change, field, words in (
        ({"minutes": "soon"}, "minutes", "whole number"),
        ({"minutes": "61"}, "minutes", "3600"),
        ({"models": "a*b"}, "models", "only at its end"),
        ({"scopes": []}, "", "Choose at least one"),
        ({"scopes": ["mlflow:admin"]}, "", "outlive the trust"),
    ):
        fields = changed(here, trust_id, **change)
        found, message = here.refused(f"{trust_id}/edit", fields, 400)
        assert (found, words in message) == (field, True), (change, found, message)
    fields = changed(here, trust_id, minutes="soon", models="acme-*", no_delete="on")
    text = unescape(here.post(f"{trust_id}/edit", fields).text)
    for kept in ('value="soon"', ">acme-*</textarea>", 'name="no_delete" checked'):
        assert kept in text, kept
    assert here.trusts.get(trust_id).trust.models == ()
    for status, trust in ((404, "trust_0"), (404, "trust_%00")):
        here.get(page=f"trusts/{trust}/edit", status=status)
        assert here.post(f"{trust}/edit", fields).status_code == status


def test_form_that_somebody_else_s_edit_has_outdated_overwrites_nothing(here: TrustsPage) -> None:
    trust_id = here.add()
    edit = f"{trust_id}/edit"
    for meanwhile, stale in (
        ({"ttl": 600.0}, {"scopes": ["model:read"]}),
        ({"models": ("acme-*",)}, {"minutes": "15"}),
        ({"scopes": ("model:read",)}, {"forget_ids": "on"}),
        ({"no_delete": True}, {}),
    ):
        fields = changed(here, trust_id, **stale)
        here.trusts.edit(trust_id, meanwhile)
        now = here.trusts.get(trust_id)
        field, message = here.refused(edit, fields, 409)
        assert field == "" and "nothing was saved" in message and here.trusts.get(trust_id) == now
        # The form shows the values of now, and can be sent again.
        again = changed(here, trust_id)
        shown = unescape(here.post(edit, fields).text)
        assert f'name="minutes" value="{again["minutes"]}"' in shown, meanwhile
        assert f">{again['models']}</textarea>" in shown, meanwhile
        assert here.done(edit, again).startswith("Nothing was changed")
    # A job's exchange pins ids, which this form doesn't overwrite.
    fields = changed(here, trust_id, minutes="20")
    here.trusts.exchange(trust_id, GITHUB, digest="0" * 64, token_id="1", ends_at=2e9, jwks=None)
    assert here.done(edit, fields).startswith("Changed")
    assert here.refused(edit, changed(here, trust_id, minutes="5", seen=None), 409)


def test_mistake_in_an_outdated_form_does_not_make_it_current(here: TrustsPage) -> None:
    trust_id = here.add()
    edit = f"{trust_id}/edit"
    for mistake in ({"minutes": "soon"}, {"minutes": "61"}, {"models": "a*b"}, {"scopes": []}):
        here.trusts.edit(trust_id, {"scopes": ("model:read", "model:write"), "models": ()})
        fields = changed(here, trust_id, **mistake)
        here.trusts.edit(trust_id, {"scopes": ("model:read",), "models": ("acme-*",)})
        now = here.trusts.get(trust_id)
        shown = here.post(edit, fields)
        (seen,) = re.findall(r'name="seen" value="([^"]*)"', shown.text)
        corrected = {
            "seen": seen,
            "minutes": "20",
            "models": "",
            "scopes": ["model:read", "model:write"],
        }
        here.refused(edit, corrected, 409)
        assert shown.status_code == 400 and here.trusts.get(trust_id) == now, mistake


def test_supplier_edits_its_own_within_its_key(here: TrustsPage) -> None:
    own, theirs = here.add(), here.add("Globex", gitlab="globex/models")
    mine = here.key(models=["acme-*"])
    answers = []
    for trust_id in (theirs, "trust_0"):
        page = here.get(caller=mine, page=f"trusts/{trust_id}/edit", status=404)
        sent = here.post(f"{trust_id}/edit", FORM, mine)
        assert sent.status_code == 404
        answers.append((page + unescape(sent.text)).replace(trust_id, "trust_0"))
    assert answers[0] == answers[1]
    page = here.get(caller=mine, page=f"trusts/{own}/edit")
    assert 'value="model:read"' in page and 'value="mlflow:read"' not in page
    edit = f"{own}/edit"
    assert "acme-*" in here.refused(edit, changed(here, own, models="acme-x"), 403, mine)[1]
    here.trusts.edit(own, {"models": ("acme-x",)})
    here.done(edit, changed(here, own, models="acme-y"), mine)
    assert here.trusts.get(own).trust.models == ("acme-y",)
    # A scope that the trust has and the key has not is shown, so that nobody drops it by mistake.
    here.trusts.edit(own, {"scopes": ["mlflow:read", "model:write"]})
    assert 'value="mlflow:read" checked' in here.get(caller=mine, page=f"trusts/{own}/edit")
    fields = changed(here, own, models="acme-z")
    assert "mlflow:read" in here.refused(edit, fields, 403, mine)[1]


def test_minutes_are_within_the_maximum(tmp_path: Path) -> None:
    here = TrustsPage(tmp_path, lifetimes=Lifetimes(longest=300.0))
    page = here.get()
    assert "From 1 to 5." in page and 'name="minutes" value="5"' in page
    field, message = here.refused("add", {**FORM, "owner": "ACME", "minutes": "6"}, 400)
    assert field == "minutes" and "HOKUSAI_AUTH_KEY_LIFETIME_MAX" in message


def test_page_says_that_nothing_is_exchanged_without_public_urls(tmp_path: Path) -> None:
    for urls in ((), ("https://registry.example.com",)):
        (tmp_path / str(len(urls))).mkdir()
        here = TrustsPage(tmp_path / str(len(urls)), public_urls=urls)
        for caller in (ADMIN, here.key()):
            assert ("HOKUSAI_AUTH_PUBLIC_URLS" in here.get(caller=caller)) is (not urls)


def test_buttons_are_those_that_the_key_may_press(here: TrustsPage) -> None:
    here.add()
    for caller, may_add, may_remove in (
        (ADMIN, True, True),
        (here.key(), True, True),
        (here.key("ACME", "model:read"), False, False),
        (here.key(no_delete=True), True, False),
    ):
        page = here.get(caller=caller)
        assert "acme/models on GitHub" in page
        assert ("Trust it" in page, "Remove now" in page) == (may_add, may_remove)
        assert (">Edit<" in page) is may_add


def test_link_is_there_for_those_who_have_the_page(
    here: TrustsPage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").mkdir()
    shut = TrustsPage(tmp_path / "other", suppliers=False)
    without = TrustsPage(tmp_path / "other", has_store=False)
    of_job = replace(here.key(), source="github:acme/models@1#2")
    elsewhere = replace(here.key(), key_id="key_0")
    for site, caller, linked in (
        (here, ADMIN, True),
        (here, here.key(), True),
        (here, here.key("ACME", "model:read"), True),
        (here, of_job, False),
        (here, elsewhere, False),
        (shut, ADMIN, True),
        (shut, shut.key(), False),
        (without, ADMIN, False),
        (without, without.key(), False),
    ):
        assert (">Trusts</a>" in site.get(caller=caller, page="keys")) is linked
    assert "exchanged" in here.get(caller=of_job, status=403)
    assert "own key store" in here.get(caller=elsewhere, status=403)
    assert "operator manages" in shut.get(caller=shut.key(), status=403)
    for caller in (ADMIN, without.key()):
        assert "exchanges no identity tokens" in without.get(caller=caller, status=404)
        assert without.post("add", FORM, caller).status_code == 404

    # A page that shows a new key, once, must not be lost for a link.
    caller = here.key()

    def fail(*_: object) -> None:
        raise AuthorityUnavailable("down")

    monkeypatch.setattr(Trusts, "of", fail)
    assert ">Trusts</a>" not in here.get(caller=caller, page="keys")


def test_forms_count_only_from_a_page_of_the_session(here: TrustsPage) -> None:
    trust_id = here.add()
    fields = {**FORM, "owner": "ACME", "environment": "x", "trust_id": trust_id}
    before = here.store.database.audited()
    for what in ("add", "remove", f"{trust_id}/edit"):
        for token in ("", browser.csrf_token(keys.session_token()), "\xe9"):
            answer = here.post(what, {**fields, "csrf": token})
            assert answer.status_code == 400
            assert "earlier session" in answer.text
        path = f"/hokusai/trusts/{what}"
        assert here.pages.ask("POST", path, ADMIN, data=fields).status_code == 400
    assert here.store.database.audited() == before
