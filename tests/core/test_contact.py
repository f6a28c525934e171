"""The contact for questions, in the operator's words."""

from __future__ import annotations

from mlflow_hokusai_auth.core.contact import link, problem


def test_contact_is_a_text_a_mail_address_or_an_https_url() -> None:
    rows = [
        ("", None, ""),
        ("the MLOps team, room 3.14", None, ""),
        ("Équipe MLOps, #mlflow", None, ""),
        ("ml-ops+keys@example.co.uk", None, "mailto:ml-ops+keys@example.co.uk"),
        ("Ops <ops@example.com>", None, ""),
        ("ops@example.com?bcc=all@example.com", None, ""),
        ("https://wiki.example.com/a?b=c#d", None, "https://wiki.example.com/a?b=c#d"),
        ("https://[::1]:8080/", None, "https://[::1]:8080/"),
        ("see https://wiki.example.com", None, ""),
        ("javascript:alert(1)", None, ""),
        ("http://wiki.example.com", "an https URL", ""),
        ("javascript://example.com/%0aalert(1)", "an https URL", ""),
        ("https://wiki.example.com/a b", "an https URL", ""),
        ('https://wiki.example.com"onclick=', "an https URL", ""),
        ("two\nlines", "printable text", ""),
        ("\u202etxet", "printable text", ""),
        ("x" * 200, None, ""),
        ("x" * 201, "at most 200 characters", ""),
    ]
    for text, wrong, leads in rows:
        found = problem(text)
        assert (found is None) == (wrong is None) and (wrong or "") in (found or ""), (text, found)
        assert wrong or link(text) == leads, text
