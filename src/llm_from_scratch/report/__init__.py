"""Numbers become pictures, cards and pages. Nothing is measured here and no number is typed: templates are filled from the run."""
