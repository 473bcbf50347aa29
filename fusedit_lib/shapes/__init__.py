"""The demo's own world: scenes of coloured shapes, their captions, a reader and a judge for them.

scenes.py    what a scene is, what is said about it, where things stand, what training never sees
render.py    a scene as pixels (Pillow)
detector.py  pixels as a scene again (numpy), and whether they are what a caption says
tiny_gemma.py  a small Gemma 2 that has read enough about scenes to be the demo's frozen reader

prepare_data.py and evaluate.py are the commands; nothing in fusedit.py depends on this folder.
"""
