using Flux, LinearAlgebra, PrunableFlux, Random, Statistics, Test
using PrunableFlux: compensate!, weight_gradients

net(rng, widths...; σ = tanh, bias = true) = Chain((PrunableDense(Dense(
    randn(rng, o, i) ./ sqrt(i), bias ? randn(rng, o) ./ 4 : false, o == last(widths) ? identity : σ))
    for (i, o) in zip(widths, widths[2:end]))...)
function task(rng; features = 5, n = 40, classes = 3)
    x = randn(rng, features, n)
    return x, Flux.onehotbatch(mod1.(1:n, classes), 1:classes)
end
loss_on((x, y)) = m -> Flux.logitcrossentropy(m(x), y)

"The loss as a function of all parameters in one vector, these parameters, and where the prunable weights are among them."
function flattened(model, data)
    θ, rebuild = Flux.destructure(model)
    places = [Int.(layer.dense.weight) for layer in prunables(rebuild(collect(1.0:length(θ))))]
    return θ -> loss_on(data)(rebuild(θ)), θ, places
end

@testset "magnitude and threshold" begin
    model = net(Xoshiro(1), 5, 4, 3)
    scores = saliency(Magnitude(scaled = true), model)
    @test all(s -> mean(abs2, s) ≈ 1, scores)
    layer = model[1]
    prune!(model, Threshold(q = 0.7))
    W = net(Xoshiro(1), 5, 4, 3)[1].dense.weight
    @test layer.mask == (abs.(W) .>= 0.7 * std(W; corrected = false))
    constant = Chain(PrunableDense(ones(2, 2)))
    @test sparsity(prune!(constant, Threshold())) == 0
    kept = prune!(net(Xoshiro(1), 5, 4, 3), Threshold(tau = 100); structure = Global(min_kept = 2))
    @test [count(l.mask) for l in kept] == [2, 2]
    @test_throws ArgumentError prune!(model, Magnitude())
    @test_throws ArgumentError prune!(model, Threshold(); structure = Neurons())
end

@testset "first-order scores against finite differences" begin
    rng = Xoshiro(2)
    model, data = net(rng, 5, 4, 3), task(rng)
    f, θ, places = flattened(model, data)
    slope(i) = (step = 1e-5; e = step .* (eachindex(θ) .== i); (f(θ .+ e) - f(θ .- e)) / 2step)
    for (score, place) in zip(saliency(Taylor(squared = false, batchsize = 40), model, data), places)
        @test score ≈ abs.(slope.(place) .* θ[place]) rtol = 1e-6
    end
    parts = [saliency(Taylor(batchsize = 40), model, (data[1][:, r], data[2][:, r])) for r in (1:15, 16:30, 31:40)]
    @test saliency(Taylor(batchsize = 15), model, data) ≈ sum(parts) ./ 3
    first_six = (data[1][:, 1:6], data[2][:, 1:6])
    @test saliency(SNIP(per_class = 2), model, data) ≈ saliency(Taylor(false, 6, Flux.logitcrossentropy), model, first_six)
end

@testset "GraSP against the whole Hessian" begin
    rng = Xoshiro(3)
    for σ in (tanh, relu)
        model, data = prune!(net(rng, 5, 4, 3; σ, bias = false), Magnitude(); sparsity = 0.3), task(rng; n = 6)
        cooled = (m, T) -> (f -> Flux.logitcrossentropy(m(data[1]) ./ T, data[2]))
        θ, rebuild = Flux.destructure(model)
        g(θ) = Flux.gradient(θ -> Flux.logitcrossentropy(rebuild(θ)(data[1]) ./ 2, data[2]), θ)[1]
        step = 1e-6
        Hg = (g(θ .+ step .* g(θ)) .- g(θ .- step .* g(θ))) ./ 2step
        scores = saliency(GraSP(per_class = 2, temperature = 2), model, data)
        @test reduce(vcat, vec.(scores)) ≈ θ .* Hg rtol = 1e-5
    end
end

@testset "SynFlow conserves flow" begin
    model = net(Xoshiro(4), 5, 6, 4, 3)
    scores = saliency(SynFlow(), model)
    R = sum(foldl((x, l) -> abs.(l.dense.weight) * x, model; init = ones(5)))
    @test all(s -> sum(s) ≈ R, scores)
    deep = net(Xoshiro(5), 20, fill(20, 8)..., 5; σ = relu)
    prune!(deep, SynFlow(); sparsity = 0.99)
    @test all(l -> any(l.mask), deep)
    @test sum(l -> count(l.mask), deep) == sum(l -> length(l.mask), deep) - round(Int, 0.99sum(l -> length(l.mask), deep))
end

@testset "OBD" begin
    rng = Xoshiro(6)
    model, data = net(rng, 5, 4, 3), task(rng)
    f, θ, places = flattened(model, data)
    H = Flux.Zygote.hessian(f, θ)
    for (score, place) in zip(saliency(OBD(exact = true), model, data), places)
        @test score ≈ diag(H)[place] .* θ[place] .^ 2 ./ 2 rtol = 1e-8
    end
    # of a single layer the recursion is the Hessian itself; so is a last layer's part
    single = net(rng, 5, 3)
    @test saliency(OBD(), single, data) ≈ saliency(OBD(exact = true), single, data)
    @test last(saliency(OBD(), model, data)) ≈ last(saliency(OBD(exact = true), model, data))
    @test_throws ArgumentError saliency(OBD(), Chain(Parallel(+, PrunableDense(2 => 2), identity)), (rand(2, 3), rand(2, 3)))
    @test_throws ArgumentError saliency(OBD(exact = true), Chain(PrunableDense(200 => 101)), (rand(200, 2), rand(101, 2)))
end

@testset "OBS by layer is least squares" begin
    rng = Xoshiro(7)
    model, data = net(rng, 6, 5, 3), task(rng; features = 6)
    original = deepcopy(model)
    x = data[1]
    prune!(model, OBS(damping = 0, iterations = 1), data; sparsity = 0.4, structure = Layerwise())
    inputs = (x, original[1](x))
    for (now, was, x) in zip(model, original, inputs), i in axes(now.mask, 1)
        kept = now.mask[i, :]
        @test now.dense.weight[i, kept] ≈ x[kept, :]' \ (x' * was.dense.weight[i, :])
        @test all(iszero, now.dense.weight[i, .!kept])
    end
    scores = saliency(OBS(damping = 0), original, data)
    for q in 1:6 # deleting one weight and solving for the others costs just what is predicted
        kept = setdiff(1:6, q)
        target = x' * original[1].dense.weight[2, :]
        cost = sum(abs2, x[kept, :]' * (x[kept, :]' \ target) .- target) / 2size(x, 2)
        @test scores[1][2, q] ≈ cost
    end
    x[3, :] .= 0
    before = deepcopy(Flux.state(original))
    @test_throws ArgumentError prune!(original, OBS(damping = 0), data; sparsity = 0.5)
    @test Flux.state(original) == before
    prune!(original, OBS(), data; sparsity = 0.5)
    @test sum(l -> count(l.mask), original) == 45 - round(Int, 22.5)
end

@testset "full OBS: $(bias ? "with" : "without") biases" for bias in (true, false)
    rng = Xoshiro(8)
    single, data = net(rng, 5, 3; bias), task(rng)
    f, θ, places = flattened(single, data)
    H = Flux.Zygote.hessian(f, θ) # of one layer the Gauss–Newton matrix is the Hessian
    H += 0.01 * mean(diag(H)) * I
    @test only(saliency(OBS(full = true), single, data)) ≈ θ[only(places)] .^ 2 ./ (2diag(inv(H))[only(places)])
    q = 7
    before, after = [trues(3, 5)], [trues(3, 5)]
    after[1][q] = false
    gone = only(places)[q]
    expected = θ .- θ[gone] / inv(H)[gone, gone] .* inv(H)[:, gone] # equation 5 of Hassibi & Stork
    compensate!(OBS(full = true), single, before, after, data)
    now, _ = Flux.destructure(single)
    others = setdiff(eachindex(θ), gone)
    @test now[others] ≈ expected[others]
    @test_throws ArgumentError saliency(OBS(full = true), Chain(PrunableDense(100 => 51)), (rand(100, 2), rand(51, 2)))
end

@testset "Wanda and Activation" begin
    rng = Xoshiro(9)
    model, (x, y) = net(rng, 5, 4, 3; σ = relu), task(rng)
    hidden = model[1](x)
    @test saliency(Wanda(), model, (x, y)) ≈
          [abs.(l.dense.weight) .* sqrt.(sum(abs2, i; dims = 2))' for (l, i) in zip(model, (x, hidden))]
    @test first(saliency(Activation(), model, (x, y))) ≈ vec(mean(abs, hidden; dims = 2))
    @test first(saliency(Activation(zeros = true), model, (x, y))) ≈ vec(mean(!iszero, hidden; dims = 2))
    prune!(model, Wanda(), (x, y); sparsity = 0.5, structure = PerOutput())
    @test all(==(3), sum(model[1].mask; dims = 2)) && all(==(2), sum(model[2].mask; dims = 2))
end

@testset "Movement follows the weights" begin
    rng = Xoshiro(10)
    model, data = net(rng, 5, 4, 3), task(rng)
    before = deepcopy(Flux.state(model))
    once = saliency(Movement(training = Training(epochs = 1, batchsize = 40)), model, data)
    gradients = weight_gradients(loss_on(data), model)
    @test once ≈ [-l.dense.weight .* g for (l, g) in zip(model, gradients)]
    @test saliency(Movement(training = Training(epochs = 3, batchsize = 7)), model, data) != once
    @test Flux.state(model) == before
end

@testset "duplicates cost nothing: $(nameof(σ)), by $(activations ? "activations" : "weights")" for
        σ in (relu, tanh), activations in (false, true)
    rng = Xoshiro(11)
    model, data = net(rng, 5, 6, 3; σ), task(rng)
    (; weight, bias) = model[1].dense
    weight[4, :], bias[4] = weight[2, :], bias[2]
    if σ === relu
        weight[5, :], bias[5] = 3 .* weight[1, :], 3 * bias[1]
    else
        weight[5, :], bias[5] = weight[2, :], bias[2]
    end
    expected = model(data[1])
    prune!(model, Redundancy(; activations), data; sparsity = 1 / 3, structure = Neurons())
    @test count(any(model[1].mask; dims = 2)) == 4
    @test model(data[1]) ≈ expected rtol = 1e-10
    @test compact(model)(data[1]) ≈ expected rtol = 1e-10
    @test size(compact(model)[1].mask) == (4, 5)
end

@testset "EdgePopup finds a subnetwork of frozen weights" begin
    rng = Xoshiro(12)
    model = net(rng, 5, 60, 3; σ = relu)
    x = randn(rng, 5, 300)
    y = Flux.onehotbatch(map(c -> argmax(c[1:3]), eachcol(x)), 1:3)
    before = deepcopy(Flux.state(model))
    criterion = EdgePopup(training = Training(epochs = 30, optimiser = Momentum(0.1, 0.9)))
    scores = saliency(criterion, model, (x, y))
    @test Flux.state(model) == before
    untrained = evaluate(model, (x, y)).accuracy
    kept = [copy(l.dense.weight) for l in model]
    prune!(model, criterion, (x, y); sparsity = 0.5, structure = Layerwise())
    @test all(((l, W),) -> l.dense.weight[l.mask] == W[l.mask], zip(model, kept))
    @test evaluate(model, (x, y)).accuracy > max(0.85, untrained + 0.2)
end

criteria = (Taylor(), Taylor(squared = false), SNIP(per_class = 3), GraSP(per_class = 3), OBD(), OBD(exact = true), OBS(),
            OBS(full = true), Wanda(), Movement(), EdgePopup(sparsity = 0.6, training = Training(epochs = 1)))

@testset "$(nameof(typeof(criterion))) leaves the rest alone, and needs data" for criterion in criteria
    rng = Xoshiro(13)
    data, structure = task(rng), criterion isa EdgePopup ? Layerwise() : Global()
    for T in (Float32, Float64)
        model = prune!(PrunableFlux.fmap(a -> a isa AbstractArray{Float64} ? T.(a) : a, net(rng, 5, 4, 3; σ = relu)),
                       Magnitude(); sparsity = 0.2)
        before, masks = deepcopy(Flux.state(model)), [copy(l.mask) for l in model]
        scores = saliency(criterion, model, data)
        @test Flux.state(model) == before
        @test all(((s, m),) -> size(s) == size(m) && eltype(s) == Float64 && !any(isnan, s[m]), zip(scores, masks))
        @test_throws ArgumentError prune!(model, criterion; sparsity = 0.5)
        @test Flux.state(model) == before
        prune!(model, criterion, data; sparsity = 0.6, structure)
        @test sum(l -> count(l.mask), model) == 32 - round(Int, 0.6 * 32)
        @test all(((l, m),) -> all(m .>= l.mask), zip(model, masks))
        @test all(l -> all(iszero, l.dense.weight[.!l.mask]) && eltype(l.dense.weight) == T, model)
        again = deepcopy(Flux.state(model))
        prune!(model, criterion, data; sparsity = 0.6, structure)
        @test Flux.state(model) == again
    end
end

@testset "bad data" begin
    model = net(Xoshiro(14), 5, 4, 3)
    x, y = task(Xoshiro(14))
    poor = (x, Flux.onehotbatch(fill(1, 40), 1:3))
    for criterion in (SNIP(), GraSP())
        @test_throws ArgumentError saliency(criterion, model, poor)
    end
    x[1] = NaN
    before = deepcopy(Flux.state(model))
    @test_throws ArgumentError prune!(model, Taylor(), (x, y); sparsity = 0.5)
    @test_throws ArgumentError prune!(model, Activation(), (x, y); sparsity = 0.5)
    @test_throws ArgumentError prune!(model, Redundancy(activations = true); sparsity = 0.5, structure = Neurons())
    @test Flux.state(model) == before
end

@testset "criteria that make no sense" begin
    @test_throws ArgumentError Threshold(tau = -1.0)
    @test_throws ArgumentError Threshold(q = NaN)
    @test_throws ArgumentError OBD(loss = Flux.mse)
    for norm in (0, 0.5, Inf, NaN)
        @test_throws ArgumentError Neurons(; norm)
    end
end

@testset "scores of models that are no plain chains" begin
    rng = Xoshiro(15)
    shared = PrunableDense(4 => 4, tanh)
    model = Chain(Dropout(0.5), shared, Parallel(+, shared, Chain(BatchNorm(4), PrunableDense(4 => 4))), PrunableDense(4 => 3))
    data = task(rng; features = 4)
    for criterion in (Taylor(), SNIP(), GraSP(), SynFlow(), Wanda(), Movement(), OBS())
        scores = saliency(criterion, model, data)
        @test map(size, scores) == [(4, 4), (4, 4), (3, 4)]
        criterion isa Movement || @test scores == saliency(criterion, model, data) # Dropout is on in training only
    end
end
