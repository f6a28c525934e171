// Somebody followed a link from another site. The browser kept the session's cookie to itself then
// (SameSite=Strict), but sends it for what is asked for from here: so try once more. Whoever has no
// session comes back, and then from this very site, for which the server renders no `data-try`.
const { try: target } = document.querySelector("main").dataset;
if (target) location.replace(target + location.hash);
