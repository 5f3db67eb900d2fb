"""One timeline of a whole run, from the spans that its processes recorded."""
