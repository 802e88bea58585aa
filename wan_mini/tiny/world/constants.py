"""The numbers of the world, in pixels and frames. Changing one takes a new checkpoint and new stored figures."""

FRAMES = 33  # 9 latent frames, two seconds
HEIGHT = 128  # 8 rows of tokens
WIDTH = 192  # 12 columns of tokens
FPS = 16

KINDS = ("single", "several", "camera", "articulated")
SPLITS = ("train", "held-out")

# Radii of sprites; a range is drawn from. Margins keep what moves inside the frame.
SINGLE_SIZE = (24.0, 34.0)
SEVERAL_SIZE = (18.0, 24.0)
RESTING_SIZE = 26.0  # of the object that rests under a moving camera
BODY_SIZE = 18.0  # of the body that has a limb
ARM_SIZE = 19.0
LEG_SIZE = 15.0
BODY_REACH = 24.0  # no body of that radius reaches further from its center: what a tracker sees there is limb
BODY_HEIGHT = 14.0  # of a body's center above the joint of its limb
SINGLE_MARGIN = 30.0
SEVERAL_MARGIN = 24.0
CAMERA_MARGIN = 32.0
LIMB_MARGIN = 42.0

# Shares of the room in the frame that a path takes.
SINGLE_SHARE = (0.5, 1.0)
SEVERAL_SHARE = (0.3, 0.8)
CAMERA_SHARE = (0.3, 0.7)

TOP_SPEED = 9.0  # pixels a frame, of objects and pans
TILT = 0.25  # radians, the largest rotation of a body
ZOOM = (1.4, 2.0)  # ratio of the largest to the smallest scale of a zoom
TRIES = 32  # sets of paths drawn for several objects; the one that keeps them apart is taken

REACH = 0.65  # distance of a sprite's tracked points from its center, in its size; a bar's are its two joints
SHADE = 0.85  # mean share of a background's light that its clouds leave
VIVID = 76  # levels: in each pixel max(R, G, B) - min(R, G, B) is more inside sprites, less on backgrounds
