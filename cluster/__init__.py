"""The ground: connecting to Ray and planning its resources. Knows Ray, and none of the other
rooms.
"""
