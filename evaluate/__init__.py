"""Measure runs against their baselines and write one report; sweep over budgets.

Where things are, in the order they run:

- `args`, `run`: the command line of ``python -m evaluate`` and what it does.
- `prepare`, `compare`: the comparison, stage by stage; a contender that fails never loses the rest.
- `contenders`, `original`, `peer_llama`: what is compared: every artefact of the runs, the dense
  original written and exported beside them, llama.cpp.
- `runners`, `torch_runner`: one interface over all of them.
- `quality`: what each contender scored, kept on disk. `perplexity` on the windows of `text_source`;
  `probe_suite`, `probes`, `probe_tasks`, `probe_result` and the data in `tasks/`; `bootstrap`.
- `latency` with the one timing function of `timing` and the machine's `ceilings`; `footprint` (load
  time, memory); `module_time` and `module_stack` (compressed modules alone); `environment`.
- `report/`: report.json (`build`, `report_schema.json`), its `verdict`, and its two pages.
- `sweep/`: ``python -m evaluate sweep``.
"""
