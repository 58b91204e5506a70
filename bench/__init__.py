"""The bench: a stand-in engine, an independent judge, recorded data, and what is measured with them.

Engine, judge, ceiling and the rows they are made of share no code with the sidecar, which they measure and judge.
"""
