// The code of a one-time link stands in the fragment of the page's address. Without this script, people
// paste the link into the form.
const $ = (selector) => document.querySelector(selector);

function fill() {
  const field = $("#code");
  if (!field || !location.hash) return;
  field.value = location.hash.slice(1);
  // The button is all that is left to do. A field with a problem stays, to be mended.
  $("[data-link]").hidden = !$("#problem");
}

// Before that, the page has no button yet: this script is not deferred.
addEventListener("DOMContentLoaded", () => {
  // To load the answer of a form again then shows the empty page, and does not send the form again, which
  // would be one more refused attempt.
  history.replaceState(null, "", location.href);

  // On the page of a key, another link must not look like this one: its fragment alone loads nothing.
  addEventListener("hashchange", () => {
    if ($("#code")) fill();
    else location.replace(`${location.pathname}?${location.hash}`);
  });

  $("form")?.addEventListener("submit", () => {
    // The history then keeps no code.
    history.replaceState(null, "", location.pathname);
  });

  for (const button of document.querySelectorAll("[data-copy]")) {
    button.hidden = false;
    button.addEventListener("click", async () => {
      const field = document.getElementById(button.dataset.copy);
      field.select();
      let done = true;
      try {
        await navigator.clipboard.writeText(field.value);
      } catch {
        done = document.execCommand("copy"); // The clipboard needs https and permission.
      }
      $(".status").textContent = done ? "Copied." : "Copying is not allowed here. Press Ctrl+C.";
      $(".status").classList.toggle("warns", !done);
      button.focus();
    });
  }

  fill();
});
