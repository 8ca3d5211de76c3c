"""Run, serve, measure and package an exported engine, without torch or transformers."""
