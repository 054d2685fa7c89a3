"""From a row of the source table to documents that passed the gate, and from documents to what a model reads."""
