"""The demo's world: scenes of coloured shapes, their captions, and code that checks images.

scenes.py          scenes, their captions and layouts, and the compositions held out of training
render.py          draws a scene (Pillow)
detector.py        recovers the scene from an image (NumPy) and compares it with a caption
training_text.py   text about scenes: captions, questions and answers
tiny_gemma.py      trains a small Gemma 2 on that text, the demo's frozen text tower

The commands are in prepare_data.py and evaluate.py. fusedit.py does not depend on this folder.
"""
