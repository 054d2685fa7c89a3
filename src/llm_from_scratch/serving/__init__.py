"""The model behind HTTP: OpenAI's API and questions answered with citations, carried by BentoML.

`app` is the API on plain FastAPI and `responder` the model behind it; only `service` and `package` know BentoML.
"""
