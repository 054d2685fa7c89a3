"""Finding what to read before answering: passages, their vectors, two ways to search them, and answers that name their sources."""
