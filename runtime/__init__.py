"""The runtime: artefact, session, engine, chat. Never imports the TVM compiler."""
