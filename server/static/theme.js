// Runs before the page is drawn, so that it does not flash in the wrong colours.
try {
  const theme = JSON.parse(localStorage.getItem("qrun.settings") || "{}").theme;
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // No storage: the system's colours.
}
