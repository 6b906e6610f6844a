"""The study: its programs, specs, figures and page."""
