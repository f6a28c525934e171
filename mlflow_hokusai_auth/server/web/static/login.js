// After a link from another site the browser does not send the session's cookie (SameSite=Strict), but it
// does for a request from this page, so try once more. A user without a session is sent back here; the
// server renders no `data-try` then, as the request came from this site.
const { try: target } = document.querySelector("main").dataset;
if (target) location.replace(target + location.hash);
