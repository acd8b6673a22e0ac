"""What runs inside an engine's own environment: the standard library, numpy and that engine.

Nothing here may import dlp_deploy, and the syntax is that of Python 3.9, the oldest interpreter an
engine may need. A worker is started by path, `python <this folder> <module> <cores>`; see __main__.
"""
