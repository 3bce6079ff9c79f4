# Prune a network in Julia, without Python: julia --project=julia examples/prune_in_julia.jl [rounds]

using Flux, PrunableFlux, Random

rounds = parse(Int, get(ARGS, 1, "8"))
rng = Xoshiro(0)

# Two interleaved spirals.
function spirals(n)
    class = rand(rng, Bool, n)
    t = 3 .* sqrt.(rand(rng, Float32, n))
    angle = 2 .* t .+ π .* class
    x = permutedims([t .* cos.(angle) t .* sin.(angle)]) .+ 0.1f0 .* randn(rng, Float32, 2, n)
    return Float32.(x), Flux.onehotbatch(class, (false, true))
end

model = prunable(Chain(Dense(2 => 64, relu), Dense(64 => 64, relu), Dense(64 => 2)))
history = iterative_prune!(model, spirals(2000), spirals(1000);
                           saliency = Magnitude(), structure = Global(),
                           schedule = Exponential(rate = 0.3, rounds = rounds), finetune = Rewind(),
                           training = Training(epochs = 30, optimiser = Adam(5f-3)), rng)

for row in history
    println("round ", row.round, ": ", row.nonzero, " weights, accuracy ", round(100row.accuracy; digits = 1), " %")
end
display(model)
