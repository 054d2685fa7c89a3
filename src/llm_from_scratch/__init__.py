"""Raw text becomes a language model that answers questions over HTTP, and every number comes out of that run."""
